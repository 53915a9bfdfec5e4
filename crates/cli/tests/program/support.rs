//! A temporary folder to run the program in, and a tiny training run with milliseconds per step.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// The files of a checkpoint that further training depends on.
pub const STATE: [&str; 3] = ["model.safetensors", "ema.safetensors", "optimizer.safetensors"];

/// Settings of a run with a tiny network on 12x12 images. Flags override them.
pub const TINY: [&str; 13] = [
    "--set=data.path=digits",
    "--set=data.size=12",
    "--set=data.digits_count=64",
    "--set=diffusion.timesteps=20",
    "--set=attention.down_channels=[8, 8]",
    "--set=attention.mid_channels=[8, 8]",
    "--set=attention.down_sample=[true]",
    "--set=attention.time_emb_dim=16",
    "--set=attention.num_heads=2",
    "--set=train.batch_size=4",
    "--set=optimizer.lr=1e-3",
    "--set=output.sample_count=0",
    "--set=compute.threads=2",
];

/// DDPM-Pytorch's `config/default.yaml`, as its repository has it; its images are in `data/train/images`.
pub const TUTORIAL: &str = include_str!("../../../ddpm/tests/fixtures/ddpm-pytorch.yaml");

/// A temporary folder, removed at the end of the test.
pub struct TestDir(TempDir);

/// Exit code and output of a finished program.
pub struct Done {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Done {
    /// Asserts success.
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }

    /// Asserts that it exited with `code` without a panic and that stderr contains each of `parts`.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in: {}", self.err);
        }
        self
    }
}

impl From<std::process::Output> for Done {
    fn from(output: std::process::Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program writes UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl TestDir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(inside)
    }

    /// `ddpm` with these arguments in the folder.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ddpm"));
        command.args(args.iter().map(AsRef::as_ref)).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    pub fn ddpm<S: AsRef<str>>(&self, args: &[S]) -> Done {
        self.command(args).output().unwrap().into()
    }

    /// `ddpm` in the background, with stderr piped.
    pub fn spawn<S: AsRef<str>>(&self, args: &[S]) -> Child {
        self.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// A shell script run in the folder; the program is `$ddpm` and on the path.
    #[cfg(unix)]
    pub fn shell_command(&self, script: &str) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_ddpm"));
        let folder = program.parent().unwrap().to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([folder].into_iter().chain(std::env::split_paths(&path))).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("ddpm", program).env("PATH", path).current_dir(self.0.path());
        command
    }

    /// Runs such a script.
    #[cfg(unix)]
    pub fn shell(&self, script: &str) -> Done {
        self.shell_command(script).output().unwrap().into()
    }

    /// Trains the tiny network as runs/NAME, with a checkpoint every `every` steps.
    pub fn train(&self, name: &str, steps: u64, every: u64, more: &[&str]) -> Done {
        self.ddpm(&train(name, steps, every, more))
    }

    /// The folder of a checkpoint.
    pub fn checkpoint(&self, name: &str, step: u64) -> PathBuf {
        self.path(format!("runs/{name}/checkpoints/step-{step:07}"))
    }

    /// Asserts that the run's checkpoint of `step` can be sampled from, with no partial ones beside it.
    #[track_caller]
    pub fn assert_intact(&self, name: &str, step: u64) {
        let names = names(&self.path(format!("runs/{name}/checkpoints")));
        assert!(names.iter().all(|n| n.starts_with("step-") || n == "best.json"), "{names:?}");
        let (step, out) = (step.to_string(), format!("sampled-from-{name}"));
        let args = ["sample", name, "-n", "1", "--steps", "2", "--checkpoint", &step, "--out", &out];
        self.ddpm(&args).succeeds();
        fs::remove_dir_all(self.path(out)).unwrap();
    }
}

/// The arguments of [`TestDir::train`].
pub fn train(name: &str, steps: u64, every: u64, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["train", "--name", name].map(str::to_owned).into();
    args.extend(TINY.map(str::to_owned));
    args.extend([format!("--steps={steps}"), format!("--set=output.checkpoint_every={every}")]);
    args.extend(more.iter().map(|&a| a.to_owned()));
    args
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The contents of the [`STATE`] files of a checkpoint.
#[track_caller]
pub fn state(checkpoint: &Path) -> Vec<Vec<u8>> {
    STATE.iter().map(|name| fs::read(checkpoint.join(name)).expect(name)).collect()
}

/// Copies a folder recursively.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

/// Step and loss of every line of a run's metrics.
#[track_caller]
pub fn losses(run: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        (value["step"].as_u64().unwrap(), value["loss"].as_f64().unwrap())
    };
    text.lines().map(line).collect()
}

/// Sends SIGINT, as Ctrl-C does.
#[cfg(unix)]
#[track_caller]
pub fn interrupt(child: &Child) {
    signal(child, "-INT");
}

/// Sends a program a signal.
#[cfg(unix)]
#[track_caller]
pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Writes an image of one grey value with a dot in the centre.
pub fn image(path: &Path, height: u32, width: u32, value: u8) {
    let mut image = image::GrayImage::from_pixel(width, height, image::Luma([value]));
    image.put_pixel(width / 2, height / 2, image::Luma([255 - value]));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.save(path).unwrap();
}
