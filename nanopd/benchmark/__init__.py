"""`nanopd bench`: what the engine and its kernels reach on this machine, beside what the machine allows."""
