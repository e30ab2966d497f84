"""A worker in a Modal container: the worker of this machine, started there, behind a gateway that Modal's calls reach.

options.py   what may be asked of Modal, checked before anything is sent
arguments.py the same on a command line
image.py     what containers have installed, and this package's own source
app.py       the app of one worker: volumes, secrets; run, deployed or attached to
gateway.py   far side: hands messages between Modal's calls and the worker's socket
link.py      near side of one connection: a reliable stream of messages over calls that may be lost or repeated
backend.py   the backend: open, attach, why a worker ended
fanout.py    `map` over many containers that keep nothing; mapper.py is its far side
wire.py      messages as Modal carries them
commands.py  `interp-kernel modal ...`
failures.py  what went wrong at Modal, in words, with the command that helps
"""
