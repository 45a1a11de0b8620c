"""What comes next: forecasts of metrics, their trends, and when a limit is reached. Functions of arrays, no state.

    steps / trend / capacity   measurements in (times, values), plain dataclasses out; what a servicer calls in a thread
    command, table             the same on a CSV file: `python -m services.analytics forecast | exhaust`
    grid                       measurements become means of hours, counters become rates
    percent                    whether 100 is the most that a metric can be
    forecast                   many hourly series at once: candidates -> back-tests -> the best two -> intervals
      candidates, profiles     level + slope + profile of day or week;  daylight  when a clock is put forward or back
      intervals                from the errors of the back-tests
    growth, daily, changes     a day's peak, less its week and jumps, cut into straight pieces; the line of the newest
    odds                       the probability of passing a limit where there is no line
    robust                     medians, Theil-Sen, Mann-Kendall, over many series at once and with gaps

What must stay true: answers are functions of the measurements alone (no clock, no chance, no later row); nothing is
said without how good it was on the last weeks; nothing here knows of servers, stores or gRPC. Everything but numpy was
left out: scipy, statsmodels and statsforecast weigh 215 to 559 MB and were not better (FORESIGHT).
"""
