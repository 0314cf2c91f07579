"""An OpenAI-compatible HTTP server over a `Cluster`: `nanopd serve`. Needs `pip install 'nanopd[serve]'`.

    protocol.py    what clients may ask, and what is refused
    app.py         the routes
    gate.py        who is let in, and what became of each
    answering.py   one request's way to the cluster and its answer's way back
    forms.py       answers as OpenAI's clients expect them
    job.py         what the event loop and the cluster's thread have in common
    driver.py      the cluster's thread
    prometheus.py  what there is to count
    command.py     start and stop
"""
