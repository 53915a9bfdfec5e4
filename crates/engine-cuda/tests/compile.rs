//! Compiles every source with NVIDIA's compiler and assembler, for Ampere and Hopper. Needs NVRTC but no GPU:
//! `tools/check_cuda_kernels.sh` fetches it. Skipped, with a message, if it is not found.

use ddpm_engine_cuda::compile::{available, compile_uncached};
use ddpm_engine_cuda::source::SOURCES;

const CAPABILITIES: [(i32, i32); 2] = [(8, 0), (9, 0)];

/// Static shared memory available to a kernel by default, plus the system's share.
const MAX_SHARED_BYTES: u64 = (48 + 1) << 10;

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
                    let code = compile_uncached(source, capability).unwrap_or_else(|e| panic!("{e}"));
                    let has = |name: &str| code.windows(name.len()).any(|w| w == name.as_bytes());
                    for (name, bytes) in shared_memory(&code) {
                        assert!(
                            bytes <= MAX_SHARED_BYTES,
                            "{name}: {bytes} bytes of shared memory are too many"
                        );
                    }
                    for kernel in source.kernels {
                        assert!(has(&format!(".text.{kernel}\0")), "{}: {kernel}", source.name);
                    }
                }
            });
        }
    });
    println!("{} sources compiled for {CAPABILITIES:?}", SOURCES.len());
}

/// Each kernel's static shared memory, read off the sections `.nv.shared.NAME` of its ELF file.
fn shared_memory(elf: &[u8]) -> Vec<(String, u64)> {
    let number = |at: usize, bytes: usize| {
        elf[at..at + bytes].iter().rev().fold(0u64, |all, &byte| all << 8 | u64::from(byte))
    };
    assert_eq!(&elf[..5], b"\x7fELF\x02", "64 bits");
    let (table, size) = (number(0x28, 8) as usize, number(0x3a, 2) as usize);
    let (count, names) = (number(0x3c, 2) as usize, number(0x3e, 2) as usize);
    let section = |i: usize| table + i * size;
    let strings = number(section(names) + 0x18, 8) as usize;
    let name = |i: usize| {
        let text = &elf[strings + number(section(i), 4) as usize..];
        String::from_utf8_lossy(text.split(|&c| c == 0).next().unwrap_or_default()).into_owned()
    };
    let shared = (0..count).filter_map(|i| {
        let kernel = name(i).strip_prefix(".nv.shared.")?.to_owned();
        Some((kernel, number(section(i) + 0x20, 8)))
    });
    shared.filter(|(kernel, _)| kernel != "reserved").collect()
}

#[test]
fn compiler_errors_are_reported() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    let error = compile_uncached(&SOURCES[0], (1, 0)).expect_err("no such architecture");
    assert!(error.contains("pointwise.cu") && error.contains("1.0"), "{error}");
}

/// Each kernel is listed once. (That each exists in its source is shown by the emulator's table and the test above.)
#[test]
fn no_kernel_is_listed_twice() {
    let mut all: Vec<&str> = SOURCES.iter().flat_map(|s| s.kernels).copied().collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);
}
