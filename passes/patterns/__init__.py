"""What kernels can replace, one file a family of kernels: the tables that `fuse` looks through."""
