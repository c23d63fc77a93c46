//! Every op as the paper states it: plain loops over slices, sums in f64, never optimised. The specification.
//!
//! A tensor is a slice of f32, row-major. A function takes one row where rows do not depend on each other.

mod backend;

pub mod attention;
pub mod exchange;
pub mod linear;
pub mod mxfp4;
pub mod q8;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod sample;
pub mod swiglu;

pub use backend::Reference;
