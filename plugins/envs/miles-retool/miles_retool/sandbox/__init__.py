"""A sandbox for Python that a language model wrote.

    trainer         pool.py      sends code over a socket of its own for each call, reads the result as JSON
    `- zygote       zygote.py    one process with modules imported ahead; forks
       `- supervisor  call.py    one for each call: holds the socket, the clock and the pipes; kills
          `- program  program.py the code, behind the layers of layers.py

All but pool.py run in a bare interpreter (`python -I -S`) and import the standard library alone.
"""
