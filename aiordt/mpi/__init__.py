"""MPI: the library in this process, and actors that mpiexec started."""
