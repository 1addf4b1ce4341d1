"""Everything that only a GPU can tell, checked and measured by one command: ``python -m bench.gpu``."""
