"""`xds bench serve`: pods under load over HTTP.

1. `run` starts a pod for each way that is compared (`pods`), or takes a running one.
2. Each load (`workload`: a trace, a rate, a number of clients) is played to every pod in turn, in rounds (`driver`).
3. `figures` turns what the clients saw into percentiles, goodput and hit rates; `report` prints, writes and draws them.

The load generator is our own, because it shares the machine with the pod: `client` has the figures of others.
"""
