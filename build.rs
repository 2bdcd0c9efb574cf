//! Compiles the GPU kernels where the feature `cuda` is on; nothing else.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const KERNELS: &str = "src/ops/kernels";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={KERNELS}");
    println!("cargo::rerun-if-env-changed=NVCC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("kernels.fatbin");
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".to_owned());
    // Machine code for the A100 and the H100, and what the driver makes code of for later ones.
    let status = Command::new(&nvcc)
        .args(["--fatbin", "-O3", "-std=c++17", "-Xfatbin=-compress-all"])
        .args(["-gencode=arch=compute_80,code=sm_80"])
        .args(["-gencode=arch=compute_90,code=sm_90"])
        .args(["-gencode=arch=compute_90,code=compute_90"])
        .arg("-o")
        .arg(&out)
        .arg(format!("{KERNELS}/kernels.cu"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{nvcc} failed: {status}"),
        Err(error) => panic!(
            "{nvcc} can't be run ({error}); deploy/cuda/toolkit.sh assembles a CUDA toolkit, and \
             the variable NVCC names its compiler"
        ),
    }
}
