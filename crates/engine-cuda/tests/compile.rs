//! Every source through NVIDIA's own compiler and assembler, for Ampere and Hopper. Needs NVRTC, which needs no GPU:
//! `tools/check_cuda_kernels.sh` fetches it. Skipped, with a line, where it is not found.

use ddpm_engine_cuda::compile::{available, compile};
use ddpm_engine_cuda::source::{COMMON, SOURCES};

const CAPABILITIES: [(i32, i32); 2] = [(8, 0), (9, 0)];

#[test]
fn all_sources_compile_and_have_their_kernels() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    std::thread::scope(|scope| {
        for capability in CAPABILITIES {
            scope.spawn(move || {
                for source in &SOURCES {
                    let code = compile(source, capability).unwrap_or_else(|e| panic!("{e}"));
                    let has = |name: &str| code.windows(name.len()).any(|w| w == name.as_bytes());
                    for kernel in source.kernels {
                        assert!(has(&format!(".text.{kernel}\0")), "{}: {kernel}", source.name);
                    }
                }
            });
        }
    });
    println!("{} sources compiled for {CAPABILITIES:?}", SOURCES.len());
}

#[test]
fn errors_of_the_compiler_are_told() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    let error = compile(&SOURCES[0], (1, 0)).expect_err("no such GPU");
    assert!(error.contains("pointwise.cu") && error.contains("1.0"), "{error}");
}

/// Each kernel stands in one list, and in a text.
#[test]
fn the_lists_of_kernels_are_true() {
    let mut all: Vec<&str> = SOURCES.iter().flat_map(|s| s.kernels).copied().collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "a kernel stands in two lists");
    for source in SOURCES {
        let in_macro =
            |kernel: &str| source.text.contains("##NAME") && kernel.contains(['0', '1', '2', '4', '6', '8']);
        for kernel in source.kernels {
            assert!(
                source.text.contains(&format!("{kernel}(")) || in_macro(kernel),
                "{}: {kernel} is not in its text",
                source.name
            );
        }
    }
    assert!(COMMON.contains("struct Control"));
}
