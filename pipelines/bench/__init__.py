"""How fast igstore is beside what else one would pick, and beside what the machine could do.

``python -m pipelines.bench engine|reader|rank|quadrature|evaluate|startup`` prints a table for people and, as its last
line, one JSON object. It needs ``pip install 'igstore[bench]'``. `pipelines/BENCHMARKS.md` has the method.
"""
