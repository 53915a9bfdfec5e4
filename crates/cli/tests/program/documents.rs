//! Runs the commands of README and docs as written.
//!
//! Each document is run from top to bottom in one folder that holds the files its commands name. Commands that take hours are
//! interrupted once they have started: the test is that they are accepted, find their files, and compute.

use crate::support::{Done, TUTORIAL, TestDir, image, interrupt};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Prefixes of commands that cannot run here, and why or where they run instead.
const ELSEWHERE: &[(&str, &str)] = &[
    ("./test", "it runs this test"),
    ("cargo install", "builds what is tested here"),
    ("cargo build", "builds what is tested here"),
    ("cargo test", "crates/engine-cuda/tests, on an emulated GPU without one"),
    ("cargo run --release -p ddpm --example", "crates/ddpm/tests/examples.rs"),
    ("cargo bench -p ddpm-kernels", "crates/kernels/Cargo.toml: the benchmarks are also tests"),
    ("git clone", "no network; a folder of the same layout stands in for it"),
    ("bench/", "needs PyTorch and an hour"),
    ("python3 ", "needs PyTorch or CUDA's libraries"),
    ("target/cuda-venv/", "needs CUDA's libraries"),
    ("for ", "docs/cuda.md, for a machine with a GPU"),
    ("export ", "docs/cuda.md, for a machine with a GPU"),
    ("done", "docs/cuda.md, for a machine with a GPU"),
    ("ddpm=", "docs/cuda.md, for a machine with a GPU"),
    ("$ddpm", "docs/cuda.md, for a machine with a GPU"),
    ("time ", "docs/cuda.md, for a machine with a GPU"),
    ("compute-sanitizer", "docs/cuda.md, for a machine with a GPU"),
    ("nsys", "docs/cuda.md, for a machine with a GPU"),
    ("ddpm train --device cuda", "crates/cli/tests/cuda.rs, on a stand-in for the driver"),
    ("ddpm sample runs/run-001 --device cuda", "crates/cli/tests/cuda.rs, on a stand-in for the driver"),
];

/// How the README runs the program without installing it.
const FROM_SOURCE: &str = "cargo run --release -- ";
/// Commands that take too long to finish; all others must finish.
const LONG: [&str; 4] = ["ddpm train", "ddpm bench", "ddpm sample runs/mnist", "ddpm sample runs/cifar10"];
/// Time after which training is interrupted if its first step has not finished.
const FIRST_STEP: Duration = Duration::from_secs(8);
/// Time after which other long commands are interrupted.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time limit of a command.
const LIMIT: Duration = Duration::from_secs(240);

/// Flags added to a document's training commands to shorten them.
const SHORT: [&str; 8] = [
    "--set=diffusion.timesteps=50",
    "--set=attention.down_channels=[8, 8, 8]",
    "--set=attention.mid_channels=[8, 8, 8]",
    "--set=attention.num_heads=2",
    "--set=attention.time_emb_dim=16",
    "--set=data.digits_count=64",
    "--set=train.batch_size=4",
    "--set=output.sample_count=0",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("crates/cli lies two folders below")
        .to_owned()
}

fn read(document: &str) -> String {
    fs::read_to_string(repository().join(document)).expect(document)
}

/// README and all of docs.
fn documents() -> Vec<String> {
    let docs = fs::read_dir(repository().join("docs")).expect("docs");
    let names = docs.map(|entry| entry.expect("docs").file_name().into_string().expect("UTF-8"));
    let mut all: Vec<String> =
        names.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
    all.sort();
    all.insert(0, "README.md".to_owned());
    all
}

/// The commands in `sh` blocks, without comments.
fn commands(text: &str) -> Vec<String> {
    let (mut inside, mut all, mut open) = (false, Vec::new(), String::new());
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
            continue;
        }
        let line =
            if line.starts_with('#') { "" } else { line.split(" #").next().unwrap_or_default().trim() };
        if !inside || line.is_empty() {
            continue;
        }
        open += line.strip_suffix('\\').unwrap_or(line);
        if !line.ends_with('\\') {
            all.push(std::mem::take(&mut open));
        }
    }
    all
}

/// Inline code that begins with `ddpm `.
fn mentions(text: &str) -> Vec<String> {
    let mut inside = false;
    let outside = text.lines().filter(|line| {
        inside ^= line.starts_with("```");
        !inside && !line.starts_with("```")
    });
    let joined: Vec<&str> = outside.collect();
    let joined = joined.join(" ");
    let spans = joined.split('`').skip(1).step_by(2);
    spans.filter(|span| span.starts_with("ddpm ")).map(str::to_owned).collect()
}

/// The number of metrics lines of all runs.
fn steps(dir: &TestDir) -> usize {
    let runs = fs::read_dir(dir.path("runs")).into_iter().flatten().flatten();
    let metrics = runs.map(|run| fs::read_to_string(run.path().join("metrics.jsonl")).unwrap_or_default());
    metrics.map(|text| text.lines().count()).sum()
}

/// Runs a command in the folder, with `ddpm` on the path; interrupts a long one once it has started.
#[track_caller]
fn run(dir: &TestDir, command: &str) {
    let start = Instant::now();
    let before = steps(dir);
    let mut shell = dir.shell_command(&format!("exec {command}"));
    let mut child = shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let long = LONG.iter().any(|l| command.starts_with(l)) && !command.contains("--dry-run");
    let mut interrupted = false;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{command}: it takes too long");
        }
        let wait = if command.starts_with("ddpm train") { FIRST_STEP } else { PATIENCE };
        if long && !interrupted && (steps(dir) > before || start.elapsed() > wait) {
            interrupt(&child);
            interrupted = true;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let done = Done { code: status.code(), out: out.join().unwrap(), err: err.join().unwrap() };
    println!("{:6.1} s  {command}", start.elapsed().as_secs_f64());
    match done.code {
        Some(0) => {}
        Some(130) if interrupted => {}
        _ => panic!("{command}\n{}{}", done.out, done.err),
    }
}

/// Reads a pipe in a thread, so that the program never blocks on it.
fn drain(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        pipe.expect("a pipe").read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// Runs a document's commands from top to bottom.
#[track_caller]
fn follow(document: &str, dir: &TestDir) {
    follow_with(document, dir, &|_| ());
}

/// Like [`follow`], calling `after` after each command.
#[track_caller]
fn follow_with(document: &str, dir: &TestDir, after: &dyn Fn(&str)) {
    for command in commands(&read(document)) {
        if ELSEWHERE.iter().any(|(start, _)| command.starts_with(start)) {
            continue;
        }
        let command =
            command.strip_prefix(FROM_SOURCE).map_or(command.clone(), |rest| format!("ddpm {rest}"));
        run(dir, &command);
        after(&command);
    }
}

/// Trains a run to its end with the flags of the document's commands and those that shorten it.
#[track_caller]
fn prepare(dir: &TestDir, document: &str, name: &str, taken: &[&str], more: &[&str]) {
    let there = commands(&read(document));
    let mut args = vec!["train".to_owned(), "--name".to_owned(), name.to_owned()];
    for &command in taken {
        assert!(there.iter().any(|c| c == command), "{document} has {command:?} no more");
        let flags = command.strip_prefix(FROM_SOURCE).or(command.strip_prefix("ddpm ")).expect("a training");
        let flags = flags.split_whitespace().skip(1).filter(|flag| *flag != "--name" && *flag != name);
        args.extend(flags.map(str::to_owned));
    }
    args.extend(SHORT.iter().chain(more).map(|&flag| flag.to_owned()));
    dir.ddpm(&args).succeeds();
}

/// Writes `n` colour images.
fn images(folder: &Path, n: u32) {
    for i in 0..n {
        let image = image::RgbImage::from_fn(40, 32, |x, y| {
            image::Rgb([(x * 6) as u8, (y * 7) as u8, (i * 37 % 256) as u8])
        });
        fs::create_dir_all(folder).unwrap();
        image.save(folder.join(format!("{i}.png"))).unwrap();
    }
}

/// Writes the images that the editing commands name.
fn images_to_edit(dir: &TestDir) {
    for (name, value) in
        [("cat.png", 60), ("cat.jpg", 60), ("a.png", 100), ("b.png", 180), ("noisy.png", 120)]
    {
        image(&dir.path(name), 16, 16, value);
    }
    let mask = image::GrayImage::from_fn(16, 16, |x, _| image::Luma([if x < 8 { 255 } else { 0 }]));
    mask.save(dir.path("mask.png")).unwrap();
}

/// Writes DDPM-Pytorch's settings and images, laid out as in its repository.
fn tutorial_yaml(dir: &TestDir) {
    images(&dir.path("data/train/images"), 4);
    fs::write(dir.path("default.yaml"), TUTORIAL).unwrap();
}

/// Writes a binary CIFAR-10 batch of 130 images.
fn cifar(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let record = |i: u32| [vec![(i % 10) as u8], vec![(i * 3 % 256) as u8; 3072]].concat();
    fs::write(folder.join("data_batch_1.bin"), (0..130).flat_map(record).collect::<Vec<u8>>()).unwrap();
    let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n";
    fs::write(folder.join("batches.meta.txt"), names).unwrap();
}

/// A golden file of the library.
fn golden(path: &str) -> PathBuf {
    repository().join("crates/ddpm/tests/golden").join(path)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to)
        } else {
            assert!(fs::copy(entry.path(), to).is_ok())
        }
    }
}

#[test]
fn the_readmes_commands_run() {
    let dir = TestDir::new();
    images(&dir.path("photos"), 12);
    images(&dir.path("FOLDER"), 12);
    images_to_edit(&dir);
    tutorial_yaml(&dir);
    prepare(&dir, "README.md", "run-001", &["cargo run --release -- train"], &["--steps=20"]);
    follow_with("README.md", &dir, &|command| {
        if command.contains("--name averaged") {
            // The interrupted command has no snapshot yet.
            fs::remove_dir_all(dir.path("runs/averaged")).unwrap();
            let short = ["--steps=20", "--set=ema.snapshot_every=5"];
            prepare(&dir, "README.md", "averaged", &[command], &short);
        }
    });
}

#[test]
fn the_commands_for_sampling_run() {
    let dir = TestDir::new();
    let trainings = [
        "ddpm train --set attention.num_class_embeds=10",
        "ddpm train --set diffusion.learned_variance=true",
        "ddpm train --set ema.power_widths=0.05,0.1",
    ];
    prepare(&dir, "docs/sampling.md", "run-001", &trainings, &["--steps=1200"]);
    follow("docs/sampling.md", &dir);
}

#[test]
fn the_commands_for_editing_run() {
    let dir = TestDir::new();
    images_to_edit(&dir);
    prepare(&dir, "README.md", "run-001", &["cargo run --release -- train"], &["--steps=20"]);
    follow("docs/editing.md", &dir);
}

#[test]
fn the_commands_for_evaluation_run() {
    let dir = TestDir::new();
    images(&dir.path("held-out"), 8);
    fs::write(dir.path("held-out.csv"), "id\n1\n3\n").unwrap();
    let steps = ["--steps=1010", "--set=output.checkpoint_every=1000", "--set=output.keep_checkpoints=3"];
    prepare(&dir, "README.md", "run-001", &["cargo run --release -- train"], &steps);
    follow("docs/evaluation.md", &dir);
}

#[test]
fn the_commands_for_other_programs_checkpoints_run() {
    let dir = TestDir::new();
    fs::copy(golden("interop/attention.pth"), dir.path("ddpm_ckpt.pth")).unwrap();
    copy_folder(&golden("interop/classic"), &dir.path("ddpm-cifar10-32"));
    images(&dir.path("mnist-folder"), 4);
    follow("docs/interop.md", &dir);
}

#[test]
fn the_commands_for_speed_run() {
    let dir = TestDir::new();
    run(&dir, "ddpm config > mine.toml");
    follow("docs/speed.md", &dir);
}

#[test]
fn the_commands_for_gpus_run() {
    follow("docs/cuda.md", &TestDir::new());
}

#[test]
fn the_tutorials_commands_run() {
    let dir = TestDir::new();
    images(&dir.path("FOLDER"), 12);
    cifar(&dir.path("cifar-10-batches-bin"));
    tutorial_yaml(&dir);
    images(&dir.path("boneage-training-dataset"), 6);
    fs::write(
        dir.path("boneage-training-dataset.csv"),
        "id,boneage,male\n0,120,True\n1,96,False\n5,60,True\n",
    )
    .unwrap();
    prepare(&dir, "README.md", "run-001", &["cargo run --release -- train"], &["--steps=4"]);
    follow("docs/tutorials.md", &dir);
}

#[test]
fn every_document_with_commands_is_followed_and_no_exception_is_stale() {
    let followed = [
        "README.md",
        "docs/cuda.md",
        "docs/editing.md",
        "docs/evaluation.md",
        "docs/interop.md",
        "docs/sampling.md",
        "docs/speed.md",
        "docs/tutorials.md",
    ];
    let used = RefCell::new(BTreeSet::new());
    for document in documents() {
        let commands = commands(&read(&document));
        assert!(
            commands.is_empty() || followed.contains(&&*document),
            "{document} has commands that no test runs"
        );
        for command in commands {
            let start = ELSEWHERE.iter().find(|(start, _)| command.starts_with(start));
            used.borrow_mut().extend(start.map(|(start, _)| *start));
        }
    }
    for (start, _) in ELSEWHERE {
        assert!(used.borrow().contains(start), "no document has {start:?} any more");
    }
}

#[test]
fn flags_named_in_documents_exist() {
    let dir = TestDir::new();
    let mut wrong = Vec::new();
    for document in documents() {
        let text = read(&document);
        let lines = commands(&text).into_iter().filter(|c| c.starts_with("ddpm ")).chain(mentions(&text));
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            let before = words.iter().take_while(|word| word.bytes().all(|b| b.is_ascii_lowercase()));
            let nested = ["data", "show"];
            let depth = if words.first().is_some_and(|word| nested.contains(word)) { 2 } else { 1 };
            let command: Vec<&str> = before.take(depth).copied().collect();
            let help = dir.ddpm(&[&command[..], &["--help"]].concat());
            if help.code != Some(0) {
                wrong.push(format!("{document}: {line}: no such command"));
                continue;
            }
            let flags = words.iter().filter(|word| word.starts_with("--") && word.len() > 2);
            let names = flags.map(|flag| flag.split('=').next().unwrap_or_default());
            let missing = names.filter(|name| !help.out.split([' ', '\n', ',']).any(|word| word == *name));
            wrong.extend(missing.map(|name| format!("{document}: {line}: no flag {name}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
