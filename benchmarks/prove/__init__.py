"""Are the gates themselves any good? Known faults are injected, and what is found of them is counted.

machines -> clocks            the latency gate on simulated clocks: false commits, power, bias
corruptions -> quality        the quality gate on damaged models: how much it catches, and what it calls damaged
faults                        which automated test injects which fault, and whether it passes
rates                         what a count says about a probability

`python -m benchmarks.prove` runs it all, prints it and writes out/prove/prove.json.
"""
