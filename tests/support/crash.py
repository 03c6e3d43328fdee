"""An agent that is killed, or refused, at its Nth step: `python -c` text for World.agent(program=...).

A step is what the world outside can notice: a message to the kernel or to the store, a file that is opened to be written, renamed,
removed, a folder made, a program started. Counting begins when a file appears, where one is named: so that a change can be swept
as well as a start.
"""

from __future__ import annotations

PROGRAM = '''
import os, sys, socket, signal
N, AFTER, ARMED = {at}, {after}, {armed!r}
count = [0]

def armed():
    return not ARMED or os.path.exists(ARMED)

def step(what):
    """Before a step."""
    if not armed():
        return False
    count[0] += 1
    if count[0] != N:
        return False
    if AFTER:
        return True
    die(what)

def die(what):
    os.write(2, ("killed at step %d: %s\\\\n" % (N, what)).encode())
    os.kill(os.getpid(), signal.SIGKILL)

def wrapped(name):
    plain = getattr(socket.socket, name)
    def send(self, *args):
        last = step("%s of family %d" % (name, self.family))
        done = plain(self, *args)
        if last:
            die("after %s of family %d" % (name, self.family))
        return done
    return send

for name in ("send", "sendall", "sendmsg", "sendto"):
    setattr(socket.socket, name, wrapped(name))

def audit(event, args):
    if event in ("os.rename", "os.remove", "os.mkdir", "subprocess.Popen"):
        step("%s %s" % (event, args[0])) and die("%s %s" % (event, args[0]))
    elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR) and not args[0].startswith("/dev"):
        step("open %s" % args[0]) and die("open %s" % args[0])

sys.addaudithook(audit)
from overlay.main import main
main()
'''


def killed_at(step: int, after: bool = False, armed: str = "") -> str:
    """The agent that is killed at a step (from 1), before it or (of a message) after it."""
    return PROGRAM.format(at=step, after=after, armed=armed)
