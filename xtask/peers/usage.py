#!/usr/bin/env python3
"""usage.py SECONDS COMMAND...

Runs a command, ends it after SECONDS, hands its output on, and adds one line of JSON: the wall-clock time until its
first line, its processor time, its involuntary context switches and its peak memory."""
import json
import resource
import subprocess
import sys
import threading
import time

begun = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE)
bound = threading.Timer(float(sys.argv[1]), child.kill)
bound.daemon = True
bound.start()
first = None
for line in child.stdout:
    first = first or time.perf_counter() - begun
    sys.stdout.buffer.write(line)
status = child.wait()
bound.cancel()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
sys.stdout.flush()
print(json.dumps({
    "first_line_s": first, "cpu_s": used.ru_utime + used.ru_stime, "involuntary": used.ru_nivcsw,
    "peak_gb": used.ru_maxrss * 1024 / 1e9}))
sys.exit(0 if status == 0 else 1)
