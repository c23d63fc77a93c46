//! NVIDIA's GPUs. Every library is opened at run time, if it is there: the same binary runs where there is none.

pub mod libraries;
