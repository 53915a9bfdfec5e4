//! The examples run without arguments and succeed. Cargo builds them together with the tests.

use std::path::{Path, PathBuf};
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

/// Runs an example in a folder, which also serves for temporary files; returns what it prints.
fn run(name: &str, arguments: &[&str], folder: &Path) -> String {
    let mut command = Command::new(program(name));
    command.args(arguments).current_dir(folder);
    for variable in ["TMPDIR", "TMP", "TEMP"] {
        command.env(variable, folder);
    }
    let Output { status, stdout, stderr } = command.output().expect("the example starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{name}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}

#[test]
fn own_data_set_trains_and_samples() {
    let folder = tempfile::tempdir().expect("a folder");
    let stdout = run("own_data_set", &[], folder.path());
    assert!(stdout.contains("sampled 4 images of 16x16 grey"), "{stdout}");
}

#[test]
fn own_denoiser_samples_its_distribution() {
    // The example itself checks the samples' mean and deviation.
    let folder = tempfile::tempdir().expect("a folder");
    let stdout = run("own_denoiser", &[], folder.path());
    assert_eq!(stdout.lines().count(), 4, "{stdout}");
}

#[test]
fn a_run_is_trained_on_a_folder_and_sampled() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("photos")).expect("a folder");
    for k in 0..10 {
        let photo = image::RgbImage::from_pixel(20, 18, image::Rgb([25 * k, 90, 200]));
        photo.save(folder.path().join(format!("photos/{k}.png"))).expect("an image");
    }
    let trained = run("train", &["photos", "16", "10"], folder.path());
    assert!(trained.contains("10/10: loss ") && trained.contains("Finished: runs/run-001"), "{trained}");
    let sampled = run("sample", &["run-001"], folder.path());
    assert!(sampled.ends_with("step 20 of 20\ngrid.png\n"), "{sampled}");
    // Rows of four images of 16 pixels, with two pixels between and around them.
    let grid = image::open(folder.path().join("grid.png")).expect("an image");
    assert_eq!((grid.width(), grid.height(), grid.color()), (74, 74, image::ColorType::Rgb8));
    // The run can be resumed from another folder.
    let config = std::fs::read_to_string(folder.path().join("runs/run-001/config.toml")).expect("settings");
    let path = folder.path().join("photos");
    assert!(config.contains(&*path.canonicalize().expect("a path").to_string_lossy()), "{config}");
}
