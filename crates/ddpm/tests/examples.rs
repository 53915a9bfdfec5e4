//! The examples run without arguments and succeed. Cargo builds them together with the tests.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The example's executable, in a folder `examples` next to or above this test's executable.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's program");
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    test.ancestors()
        .skip(1)
        .map(|folder| folder.join("examples").join(&file))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{file} is not built; `cargo test -p ddpm` builds the examples too"))
}

/// Runs an example in an empty folder, which also serves for temporary files.
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
fn own_data_set_trains_and_samples() {
    let (stdout, _folder) = run("own_data_set");
    assert!(stdout.contains("sampled 4 images of 16x16 grey"), "{stdout}");
}

#[test]
fn own_denoiser_samples_its_distribution() {
    // The example itself checks the samples' mean and deviation.
    let (stdout, _folder) = run("own_denoiser");
    assert_eq!(stdout.lines().count(), 4, "{stdout}");
}

#[test]
fn sample_from_checkpoint_writes_a_grid() {
    let (stdout, folder) = run("sample_from_checkpoint");
    let sheet = folder.path().join("ddpm-example.png");
    assert!(stdout.contains(&sheet.display().to_string()), "{stdout}");
    // Four images of 16 pixels with padding of 2 between them; padding around the grid is not checked.
    let sheet = image::open(&sheet).expect("an image");
    assert!(sheet.width() >= 4 * 16 + 3 * 2 && sheet.height() == sheet.width(), "{sheet:?}");
}
