//! The examples run without arguments and end well. Cargo builds them together with the tests.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The example's program: in a folder `examples` beside or above this test's own program.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's program");
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    test.ancestors()
        .skip(1)
        .map(|folder| folder.join("examples").join(&file))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{file} is not built; `cargo test -p ddpm` builds the examples too"))
}

/// Runs an example in an empty folder, which is also its folder for temporary files.
fn run(name: &str) -> (String, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(program(name));
    command.current_dir(folder.path());
    for variable in ["TMPDIR", "TMP", "TEMP"] {
        command.env(variable, folder.path());
    }
    let Output { status, stdout, stderr } = command.output().expect("the example starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{name}: {status}\n{stdout}{stderr}");
    (stdout.into_owned(), folder)
}

#[test]
fn a_data_set_of_ones_own_is_learnt() {
    let (said, _folder) = run("own_data_set");
    assert!(said.contains("drew 4 images of 16x16 grey"), "{said}");
}

#[test]
fn a_denoiser_of_ones_own_is_sampled() {
    // The example itself checks the samples' mean and deviation.
    let (said, _folder) = run("own_denoiser");
    assert_eq!(said.lines().count(), 4, "{said}");
}

#[test]
fn a_checkpoint_is_sampled() {
    let (said, folder) = run("sample_from_checkpoint");
    let sheet = folder.path().join("ddpm-example.png");
    assert!(said.contains(&sheet.display().to_string()), "{said}");
    // Four images of 16 pixels a side and two between them; how much lies around the grid is its own affair.
    let sheet = image::open(&sheet).expect("an image");
    assert!(sheet.width() >= 4 * 16 + 3 * 2 && sheet.height() == sheet.width(), "{sheet:?}");
}
