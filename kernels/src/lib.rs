//! Every op of gpt-oss as a naive reference and as fast kernels, behind one trait.
