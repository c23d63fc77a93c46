//! Compiles the CUDA kernels for the CPU where tests run them there.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda-emu")]
    emulation();
}

#[cfg(feature = "cuda-emu")]
fn emulation() {
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-env-changed=PHALANX_EMU_SANITIZE");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("csrc").define("CUDA_EMU", None).file("csrc/emu/kernels.cc");
    // Nothing is fused that the source does not fuse; unrolling is for the GPU.
    build.flag("-ffp-contract=off").flag("-Wno-unknown-pragmas").flag("-Wno-unused-function");
    // Tests run where they are compiled: fmaf as an instruction instead of a call.
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") {
        build.flag("-mfma");
    }
    if let Ok(sanitizer) = std::env::var("PHALANX_EMU_SANITIZE") {
        build.flag(format!("-fsanitize={sanitizer}")).flag("-g");
        println!("cargo::rustc-link-lib=asan");
    }
    build.compile("phalanx_emu");
}
