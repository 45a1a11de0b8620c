"""The simulator: a fleet that behaves like a real one, for everybody who has no fleet at hand.

It writes through ``fleet.writer`` like any agent does and knows no store. Three modes share that one path:

* ``synthetic`` (``synthetic.py``): ``catalogue*`` says what is measured, ``fleet`` who measures, ``activity`` and
  ``signals`` compute a tick's values from the seed and the tick alone, ``scenarios`` bends them on demand;
* ``host`` (``host.py``): the real metrics of this machine;
* ``replay`` (``recording.py`` reads, ``replay.py`` plays): a recorded CSV file.

``schedule`` says when a tick is due, ``feed`` makes it, ``delivery`` keeps it until it is acknowledged, and
``simulator`` joins these.
"""
