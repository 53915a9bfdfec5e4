//! Builds the emulated GPU with the machine's C++ compiler: a program (`emulator`), and a library that stands in for NVIDIA's
//! driver and NVRTC (`stand-in.so`).

use ddpm_engine_cuda::source::{COMMON, SOURCES};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The build's outputs.
const BUILT: [&str; 2] = ["emulator", "stand-in.so"];

/// The folder with the program and the library; `None`, with a message, if there is no C++ compiler.
pub fn built() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(build).as_deref()
}

/// FNV-1a, as in the stand-in for NVRTC.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The files to compile.
fn files() -> Vec<(&'static str, String)> {
    let mut texts: Vec<&str> = Vec::new();
    for source in SOURCES {
        if !texts.contains(&source.text) {
            texts.push(source.text);
        }
    }
    let defines: String = SOURCES.iter().filter_map(|s| s.define).map(|d| format!("#define {d}\n")).collect();
    let (shim, machine) = (include_str!("shim.h"), include_str!("machine.cpp"));
    let entries = SOURCES.iter().flat_map(|s| s.kernels).map(|k| format!("ENTRY({k})\n")).collect();
    let source = |s: &ddpm_engine_cuda::source::Source| {
        format!("{{{:?}, {}ull, {{\"{}\"}}}},\n", s.name, hash(&s.full_text()), s.kernels.join("\", \""))
    };
    vec![
        ("machine.h", include_str!("machine.h").to_owned()),
        ("entries.h", entries),
        ("sources.h", SOURCES.iter().map(source).collect()),
        ("machine.cpp", format!("{defines}{shim}\n{COMMON}\n{}\n{machine}", texts.join("\n"))),
        ("pipes.cpp", include_str!("pipes.cpp").to_owned()),
        ("state.h", include_str!("state.h").to_owned()),
        ("nvrtc.h", include_str!("nvrtc.h").to_owned()),
        ("libraries.h", include_str!("libraries.h").to_owned()),
        ("driver.cpp", include_str!("driver.cpp").to_owned()),
    ]
}

fn build() -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    if !Command::new(&compiler).arg("--version").output().is_ok_and(|o| o.status.success()) {
        println!("skipped: no C++ compiler ({compiler}) to emulate a GPU with");
        return None;
    }
    if !cfg!(target_os = "linux") {
        println!("skipped: the emulator supports Linux only");
        return None;
    }
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let files = files();
    let same = |(name, text): &(&str, String)| {
        std::fs::read_to_string(folder.join(name)).is_ok_and(|old| old == *text)
    };
    if files.iter().all(same) && BUILT.iter().all(|name| folder.join(name).exists()) {
        return Some(folder);
    }
    // One test program builds it and others reuse it; concurrent builds use separate folders and rename.
    let mine = folder.join(format!("build-{}", std::process::id()));
    std::fs::create_dir_all(&mine).expect("a folder for the emulator");
    for (name, text) in &files {
        std::fs::write(mine.join(name), text).expect("the emulator's source");
    }
    let run = |args: &str| {
        let made = Command::new(&compiler).args(args.split(' ')).current_dir(&mine).output();
        let made = made.expect("the compiler runs");
        assert!(made.status.success(), "{compiler} {args}:\n{}", String::from_utf8_lossy(&made.stderr));
    };
    let options = "-std=c++17 -fPIC -fvisibility=hidden";
    let checks = "-U_FORTIFY_SOURCE -fsanitize=alignment -fsanitize-undefined-trap-on-error";
    run(&format!("{options} {checks} -O2 -w -c machine.cpp"));
    run(&format!("{options} -O1 -Wall -Wextra -o emulator pipes.cpp machine.o"));
    run(&format!("{options} -O1 -Wall -Wextra -pthread -shared -o stand-in.so driver.cpp machine.o"));
    for name in BUILT.into_iter().chain(files.iter().map(|(name, _)| *name)) {
        std::fs::rename(mine.join(name), folder.join(name)).expect("the build folder");
    }
    let _ = std::fs::remove_dir_all(&mine);
    Some(folder)
}

/// The library names that cudarc tries first for the driver and NVRTC.
#[allow(dead_code, reason = "for the tests with the stand-in")]
pub const ALL: &[&str] = &["libcuda.so", "libcuda.so.1", "libnvrtc.so", "libnvrtc.so.12"];

/// A folder for `LD_LIBRARY_PATH` in which the stand-in has these names; `None` as in [`built`].
#[allow(dead_code, reason = "for the tests with the stand-in")]
pub fn libraries(names: &[&str]) -> Option<PathBuf> {
    let built = built()?;
    let folder = built.join(format!("as {}", names.join(" ")));
    std::fs::create_dir_all(&folder).expect("a folder for the libraries");
    #[cfg(unix)]
    for name in names {
        let made = std::os::unix::fs::symlink(built.join("stand-in.so"), folder.join(name));
        assert!(made.is_ok() || folder.join(name).exists(), "{name}: {made:?}");
    }
    Some(folder)
}
