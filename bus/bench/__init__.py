"""Measurements of the bus against other transports, in one run with one harness: `xds bench bus`.

    run.py      plays the sections: p2p.py, collectives.py (all-to-all and moe), trampoline.py, thresholds.py
    group.py    the processes of one way, and what is asked of them; worker.py is such a process
    peers/      one file per transport; each opens pairs (ping-pong) or rows (collectives), or both
    routing.py  what all ways share: inputs, routing, gathering, weighted sum, and the check of the result
    report.py   records as JSON, tables.py as tables, plot.py as a picture

Rules of the comparison. 1. Ways take turns, round after round (A B C A B C ...), so that what else the machine does
meets them alike; the C limit and our own ways play inside one process pair, block by block. 2. The processes of a way
live through a section and sleep while it is not their turn. 3. Every way does the same work in the same kernels; only
the transport differs. INT8 rows stay INT8 at all experts. 4. Before a shape is timed its result is compared
with what it must be. 5. Every peer runs with the settings that were best for it here; the file of the peer names them.
6. From 16 KiB on an array is written anew before each message, out of the time (pingpong.py). "Handed over" is the
other condition, under which makers of zero-copy transports measure: the array stays as it is but for its first and last
byte, which the receiver checks, in the time.
"""
