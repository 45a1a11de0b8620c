"""Reading from external stores what followers have shipped to them.

`history.py` says what such a store must answer; each other file is the reader of one store. `Query` and `SeriesResult`
are the engine's own, and so are the answers: whoever asks cannot tell who answered.
"""
