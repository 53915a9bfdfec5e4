//! Errors name the place and a remedy, and leave good files untouched.

use crate::support::{TINY, TestDir, image, losses, names, state};
use std::fs;

/// Arguments of a training run without name and steps.
fn with(more: &[&'static str]) -> Vec<&'static str> {
    [&["train"], &TINY[..], more].concat()
}

#[cfg(unix)]
#[test]
fn a_partially_written_checkpoint_leaves_the_older_ones() {
    let dir = TestDir::new();
    dir.train("r", 4, 2, &[]).succeeds();
    let before = state(&dir.checkpoint("r", 4));
    // The optimizer's file is twice the model's. A block of `ulimit -f` is 512 bytes.
    let model = fs::metadata(dir.checkpoint("r", 4).join("model.safetensors")).unwrap().len();
    let blocks = model * 3 / 2 / 512;
    let resume = "exec \"$ddpm\" train --resume r --steps 8";
    let done = dir.shell(&format!("ulimit -f {blocks}; {resume}"));
    let message =
        ["step-0000006", "optimizer.safetensors: cannot write the checkpoint", "are intact", "resume"];
    let done = done.fails(1, &message);
    assert_eq!(done.err.matches("os error").count(), 1, "{}", done.err);
    assert_eq!(names(&dir.path("runs/r/checkpoints")), ["best.json", "step-0000002", "step-0000004"]);
    assert!(state(&dir.checkpoint("r", 4)) == before);
    dir.assert_intact("r", 2);
    dir.assert_intact("r", 4);

    // Without the limit it continues to the same result.
    dir.ddpm(&["train", "--resume", "r", "--steps", "8"]).succeeds();
    dir.train("whole", 8, 2, &[]).succeeds();
    assert!(state(&dir.checkpoint("r", 8)) == state(&dir.checkpoint("whole", 8)));
    assert_eq!(losses(&dir.path("runs/r")), losses(&dir.path("runs/whole")));
}

#[cfg(unix)]
#[test]
fn a_file_size_limit_is_an_error_like_a_full_disk() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    dir.shell("ulimit -f 0; exec \"$ddpm\" sample r -n 2 --steps 2")
        .fails(1, &["cannot write", "File too large"]);
    let table = "ulimit -f 0; exec \"$ddpm\" eval r --nll -n 2 --terms 2";
    dir.shell(table).fails(1, &["nll.csv: cannot write", "File too large"]);
    // Redirected output counts, too.
    dir.shell("ulimit -f 1; exec \"$ddpm\" config > settings.toml").fails(1, &["File too large"]);
    let train = crate::support::train("n", 1, 0, &[]).join("' '");
    dir.shell(&format!("ulimit -f 0; exec \"$ddpm\" '{train}'"))
        .fails(1, &["cannot write", "File too large"]);
}

#[test]
fn a_folder_that_cannot_be_created_is_named() {
    let dir = TestDir::new();
    fs::write(dir.path("file"), "").unwrap();
    dir.ddpm(&with(&["--steps", "1", "--runs", "file/runs"]))
        .fails(1, &["file/runs: cannot create the run's folder"]);
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TestDir::new();
    fs::create_dir(dir.path("locked")).unwrap();
    fs::set_permissions(dir.path("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(dir.path("locked/probe"), "").is_ok() {
        return; // root writes everywhere
    }
    dir.ddpm(&with(&["--steps", "1", "--runs", "locked/runs"]))
        .fails(1, &["locked/runs: cannot create the run's folder"]);
}

#[test]
fn all_broken_images_are_listed_and_can_be_skipped() {
    let dir = TestDir::new();
    for i in 0..8 {
        image(&dir.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    let whole = fs::read(dir.path("images/0.png")).unwrap();
    fs::write(dir.path("images/cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(dir.path("images/text.png"), "This is no image.\n").unwrap();
    fs::write(dir.path("images/nothing.jpg"), "").unwrap();
    let train = |more: &[&'static str]| dir.ddpm(&with(&[&["--data", "images", "--steps=1"], more].concat()));
    train(&[]).fails(
        1,
        &[
            "3 files cannot be read as images:",
            "images/cut.png: ",
            "images/text.png: ",
            "images/nothing.jpg: ",
            "--on-bad-file skip",
        ],
    );
    assert!(!dir.path("runs").exists());
    let done = train(&["--on-bad-file", "skip"]).succeeds();
    for part in ["8 images, 12x12 grey", "skipped ", "cut.png", "text.png", "nothing.jpg"] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    dir.assert_intact("run-001", 1);
}

#[test]
fn a_path_without_images_is_rejected_with_what_was_expected() {
    let dir = TestDir::new();
    fs::create_dir(dir.path("empty")).unwrap();
    fs::create_dir(dir.path("photos")).unwrap();
    let train = |data: &'static str| dir.ddpm(&with(&["--steps", "1", "--data", data]));
    train("empty").fails(1, &["empty: no images here (it is empty)", ".png"]);
    train("photo").fails(1, &["photo: there is no such file or folder; did you mean", "photos?"]);
    assert!(!dir.path("runs").exists());
}

#[test]
fn images_of_several_sizes_ask_for_one() {
    let dir = TestDir::new();
    for (i, height, width) in [(0, 12, 12), (1, 12, 12), (2, 24, 16)] {
        image(&dir.path(format!("images/{i}.png")), height, width, 80);
    }
    let flags: Vec<&str> = TINY.into_iter().filter(|f| !f.contains("data.size")).collect();
    let train = [&["train", "--data", "images", "--steps=1"], &flags[..]].concat();
    // The default preset sets a size; a settings file does not.
    fs::write(dir.path("plain.toml"), "").unwrap();
    let train = [&train[..], &["--config", "plain.toml"]].concat();
    dir.ddpm(&train)
        .fails(1, &["the images have 2 sizes", "12x12 (2 images)", "24x16 (1 image)", "--size H"]);
    dir.ddpm(&[&train[..], &["--size", "12x16"]].concat()).succeeds();
}

#[test]
fn sizes_that_cannot_be_halved_are_refused_with_those_that_can() {
    let dir = TestDir::new();
    dir.ddpm(&with(&["--steps=1", "--size=13"])).fails(1, &["data.size: 13x13", "12x12 or 14x14"]);
    let simple = ["--set=network.name=simple", "--set=simple.widths=[8,8,8]", "--steps=1"];
    for (size, expected) in [("33", "use 32x32 or 36x36"), ("35", "use 36x36 or 32x32"), ("2x3", "use 4x4")] {
        dir.ddpm(&with(&[&simple[..], &["--size", size]].concat())).fails(1, &[expected]);
    }
    image(&dir.path("images/a.png"), 21, 30, 80);
    fs::write(dir.path("plain.toml"), "[attention]\ndown_sample = [true, true, false]\n").unwrap();
    dir.ddpm(&["train", "--config", "plain.toml", "--data", "images", "--steps=1"])
        .fails(1, &["21x30 is not divisible by 4", "20x28 or 24x32", "--size"]);
}

#[test]
fn non_finite_values_stop_training_before_the_checkpoint_is_touched() {
    let dir = TestDir::new();
    dir.train("r", 3, 1, &[]).succeeds();
    let before = state(&dir.checkpoint("r", 3));
    // Each step multiplies the weights by 1 - lr * weight_decay.
    let explode = ["--lr=10", "--set=optimizer.name=adamw", "--set=optimizer.weight_decay=1000"];
    let resume = ["train", "--resume", "r", "--steps=100", "--set=output.checkpoint_every=100"];
    let done = dir.ddpm(&[&resume[..], &explode].concat());
    done.fails(
        1,
        &[
            "step ",
            "is not finite",
            "Resume from step 3",
            "ddpm train --resume runs/r --checkpoint 3 --lr 2e-4",
        ],
    );
    assert!(state(&dir.checkpoint("r", 3)) == before);
    dir.assert_intact("r", 3);

    // It resumes from there with the earlier settings, to the same result.
    dir.ddpm(&["train", "--resume", "r", "--steps=6"]).succeeds();
    dir.train("whole", 6, 1, &[]).succeeds();
    assert!(state(&dir.checkpoint("r", 6)) == state(&dir.checkpoint("whole", 6)));
    dir.ddpm(&with(&["--lr=1e30"])).fails(2, &["--lr", "above 0 and at most 10"]);
    let refused = ["optimizer.lr: 99 is out of range; give a number above 0 and at most 10"];
    dir.ddpm(&with(&["--set=optimizer.lr=99"])).fails(1, &refused);
}

#[test]
fn errors_do_not_promise_a_good_checkpoint_if_there_is_none() {
    let dir = TestDir::new();
    let explode = ["--lr=10", "--set=optimizer.name=adamw", "--set=optimizer.weight_decay=1000"];
    let done = dir.train("none", 100, 0, &explode);
    done.fails(
        1,
        &["is not finite", "There is no checkpoint yet; restart training from the beginning", "--lr 2e-4"],
    );
    // With a checkpoint every step, the last ones hold diverged weights.
    let done = dir.train("bad", 100, 1, &explode);
    done.fails(1, &["is not finite", "have diverged too; restart training from the beginning", "--lr 2e-4"]);
}

#[test]
fn diverged_training_fails() {
    let dir = TestDir::new();
    let done = dir.train("r", 30, 10, &["--lr=3"]).fails(
        1,
        &[
            "warning: step ",
            "training is diverging",
            "all steps are completed, but training diverged: the loss is ",
            "--lr 2e-4",
        ],
    );
    assert!(done.err.contains("predicting zero has a loss of about 1.0000"), "{}", done.err);
    // The run is complete and can be inspected; its samples are announced as those of a diverged one, those of an earlier checkpoint
    // are not.
    dir.assert_intact("r", 30);
    let warning = "warning: training of this run diverged";
    let sample = |more: &[&str]| {
        let few = ["sample", "r", "-n=1", "--sampler=ddim", "--steps=2"];
        dir.ddpm(&[&few[..], more].concat()).succeeds().err
    };
    let newest = sample(&[]);
    assert!(newest.contains(warning) && newest.contains("--checkpoint STEP"), "{newest}");
    let earlier = sample(&["--checkpoint=20"]);
    assert!(!earlier.contains(warning), "{earlier}");

    // After a good start, resuming from an earlier checkpoint helps.
    dir.train("s", 40, 20, &[]).succeeds();
    let args = ["train", "--resume", "s", "--steps=80", "--lr=1"];
    dir.ddpm(&args)
        .fails(1, &["diverged", "Resume from step 40", "--resume runs/s --checkpoint 40 --lr 2e-4"]);
    dir.ddpm(&["train", "--resume", "s", "--checkpoint", "40", "--lr", "2e-4", "--steps", "60"]).succeeds();
}

#[test]
fn initial_weights_that_overflow_fail_at_the_first_step() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    let bytes = fs::read(dir.checkpoint("r", 1).join("model.safetensors")).unwrap();
    let model = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let large: Vec<(String, Vec<usize>, Vec<u8>)> = model
        .iter()
        .map(|(name, view)| {
            let numbers = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) * 1e30);
            (name.to_owned(), view.shape().to_vec(), numbers.flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    let views = large.iter().map(|(name, shape, data)| {
        let f32s = safetensors::Dtype::F32;
        (name.clone(), safetensors::tensor::TensorView::new(f32s, shape.clone(), data).unwrap())
    });
    fs::write(dir.path("large.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let init = |more: &[&'static str]| {
        dir.ddpm(&with(&[&["--name=n", "--steps=2", "--init", "large.safetensors"], more].concat()))
    };
    init(&[]).fails(1, &["step 1: the loss is not finite", "check the initial weights (--init)"]);
    dir.assert_intact("n", 0);
}

#[test]
fn a_run_from_given_weights_keeps_them_until_its_first_checkpoint() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &["--seed=7"]).succeeds();
    let weights = dir.checkpoint("r", 2).join("model.safetensors");
    let init = weights.display().to_string();
    dir.train("whole", 3, 0, &["--init", &init]).succeeds();
    dir.assert_intact("whole", 0);
    assert_eq!(
        fs::read(dir.checkpoint("whole", 0).join("ema.safetensors")).unwrap(),
        fs::read(weights).unwrap()
    );
    // The state of a run killed before its first checkpoint.
    fs::rename(dir.path("runs/whole"), dir.path("runs/again")).unwrap();
    let expected = state(&dir.checkpoint("again", 3));
    fs::remove_dir_all(dir.checkpoint("again", 3)).unwrap();
    dir.ddpm(&["train", "--resume", "again"]).succeeds();
    assert!(state(&dir.checkpoint("again", 3)) == expected);
}

#[test]
fn weights_of_another_network_are_named_with_both_shapes() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &[]).succeeds();
    let (wide, file) = (
        ["--set=attention.down_channels=[8, 16]", "--set=attention.mid_channels=[16, 8]"],
        "model.safetensors",
    );
    dir.train("wide", 2, 1, &wide).succeeds();
    let weights = dir.checkpoint("wide", 2).join(file);

    let init = dir.train("n", 1, 0, &["--init", &weights.display().to_string()]);
    init.fails(
        1,
        &[file, "the weights of another network", "downs.0.", "the network's is [8", "network settings"],
    );
    assert!(!dir.path("runs/n").exists());

    let resume = [&["train", "--resume", "r", "--steps=3"], &wide[..]].concat();
    dir.ddpm(&resume)
        .fails(1, &["step-0000002", "attention.down_channels = [8, 8] (now [8, 16])", "--force"]);
    let forced = [&resume[..], &["--force"]].concat();
    dir.ddpm(&forced)
        .fails(1, &["step-0000002", "the weights of another network", "is [8", "network's is [16"]);
    dir.assert_intact("r", 2);

    // Another network's file in a checkpoint counts as damage: selecting it fails, otherwise the one before is used.
    fs::copy(&weights, dir.checkpoint("r", 2).join(file)).unwrap();
    dir.ddpm(&["sample", "r", "-n1", "--weights=raw", "--checkpoint=2"])
        .fails(1, &["step-0000002: model.safetensors: ", "--checkpoint step-0000001"]);
    dir.ddpm(&["train", "--resume", "r", "--checkpoint=2"])
        .fails(1, &["step-0000002: model.safetensors: ", "--checkpoint step-0000001"]);
    let done = dir.ddpm(&["train", "--resume", "r"]).succeeds();
    assert!(done.err.contains("warning: runs/r/checkpoints/step-0000002 is damaged"), "{}", done.err);
    dir.train("whole", 2, 1, &[]).succeeds();
    assert!(state(&dir.checkpoint("r", 2)) == state(&dir.checkpoint("whole", 2)));
}

#[test]
fn typos_get_suggestions() {
    let dir = TestDir::new();
    let refused = |args: &[&str], parts: &[&str]| {
        dir.ddpm(&[&["train"], args].concat()).fails(1, parts);
    };
    refused(&["--set", "train.bach_size=3"], &["train.bach_size: unknown setting; did you mean batch_size?"]);
    refused(&["--set", "batch_size=3"], &["did you mean train.batch_size?"]);
    refused(&["--set", "output.keep_checkpoints"], &["write KEY=VALUE"]);
    refused(&["--preset", "digit"], &["unknown preset \"digit\"; did you mean digits?"]);
    refused(&["--on-bad-file", "ignore"], &["data.on_bad_file: ", "fail", "skip"]);
    refused(
        &["--size", "big"],
        &["data.size: ", "expected one side in pixels, HEIGHTxWIDTH or [height, width]"],
    );
    refused(&["--resume", "r"], &["r: there is no such run; runs contains no runs"]);
    fs::write(dir.path("mine.toml"), "[train]\nsteps = 3\nleaning_rate = 1\n").unwrap();
    refused(&["--config", "mine.toml"], &["mine.toml: line 3: train.leaning_rate: unknown setting"]);
    fs::write(dir.path("mine.toml"), "[netwrk]\nnum_heads = 2\n").unwrap();
    refused(
        &["--config", "mine.toml"],
        &["mine.toml: line 2: netwrk.num_heads: unknown setting; did you mean attention"],
    );
    refused(&["--config", "their.toml"], &["their.toml: cannot read the settings"]);
    assert!(!dir.path("runs").exists());
    dir.ddpm(&["bench", "--set", "output.keep_checkpoints"]).fails(1, &["write KEY=VALUE"]);
    dir.ddpm(&["train", "--stpes", "3"]).fails(2, &["--steps"]);
    dir.ddpm(&["trian"]).fails(2, &["train"]);
    dir.ddpm(&["train", "--steps", "many"]).fails(2, &["--steps", "many"]);
    dir.ddpm(&["train", "--checkpoint", "3"]).fails(2, &["--resume"]);
}

#[test]
fn a_run_is_never_overwritten() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    let (before, config) =
        (state(&dir.checkpoint("r", 1)), fs::read(dir.path("runs/r/config.toml")).unwrap());
    dir.train("r", 2, 0, &["--seed", "1"])
        .fails(1, &["runs/r: this run already exists", "--resume runs/r", "another --name"]);
    assert!(state(&dir.checkpoint("r", 1)) == before);
    assert_eq!(fs::read(dir.path("runs/r/config.toml")).unwrap(), config);
    dir.ddpm(&with(&["--steps=1", "--name=a/b"])).fails(1, &["\"a/b\" cannot be a folder here"]);
    // Runs without a name are numbered.
    for number in ["run-001", "run-002"] {
        dir.ddpm(&with(&["--steps=1"])).succeeds();
        dir.assert_intact(number, 1);
    }
}

#[cfg(unix)]
#[test]
fn two_processes_do_not_train_one_run() {
    let dir = TestDir::new();
    let mut first = dir.spawn(&crate::support::train("r", 1_000_000, 0, &[]));
    while !dir.path("runs/r/metrics.jsonl").exists() {
        assert!(first.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let who = format!("another process (process {}) is training this run", first.id());
    dir.ddpm(&["train", "--resume", "r"]).fails(1, &["runs/r: ", &who]);
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn resuming_with_other_images_warns() {
    let dir = TestDir::new();
    for i in 0..6 {
        image(&dir.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    dir.train("r", 2, 0, &["--data", "images"]).succeeds();
    let same = dir.ddpm(&["train", "--resume", "r", "--steps=3"]).succeeds();
    assert!(!same.err.contains("warning"), "{}", same.err);
    image(&dir.path("images/5.png"), 12, 12, 200);
    let other = dir.ddpm(&["train", "--resume", "r", "--steps=4"]).succeeds();
    assert!(other.err.contains("warning: the images are not those"), "{}", other.err);
    // From then on these are the run's images.
    let same = dir.ddpm(&["train", "--resume", "r", "--steps=5"]).succeeds();
    assert!(!same.err.contains("warning"), "{}", same.err);
}

#[test]
fn a_missing_device_is_an_error_with_a_remedy() {
    let dir = TestDir::new();
    // An index that no machine has, so that it is missing with the feature `cuda`, too.
    dir.ddpm(&with(&["--steps", "1", "--device", "cuda:99", "--name", "r"]))
        .fails(1, &["cuda:99", "--device cpu"]);
    dir.ddpm(&with(&["--steps", "1", "--set", "compute.device=gpu"])).fails(1, &["compute.device", "cuda:1"]);
    dir.ddpm(&["train", "--device", "tpu"]).fails(2, &["tpu", "auto, cpu, cuda"]);
    dir.ddpm(&with(&["--steps", "1", "--device", "cpu", "--name", "r"])).succeeds();
}

#[test]
fn long_lists_are_cut_and_written_to_a_file() {
    let dir = TestDir::new();
    for i in 0..3 {
        image(&dir.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    for i in 0..500 {
        fs::write(dir.path(format!("images/bad-{i:03}.png")), "no image").unwrap();
    }
    let done = dir.ddpm(&with(&["--data", "images", "--steps=1"])).fails(
        1,
        &["500 files cannot be read as images:", "bad-019.png: ", "and 480 more", "--on-bad-file skip"],
    );
    assert!(done.err.lines().count() < 30 && !done.err.contains("bad-020.png"), "{}", done.err);
    let list = done.err.split_once("all 500 are listed in ").expect("a file").1.trim();
    let all = fs::read_to_string(list).unwrap();
    fs::remove_file(list).unwrap();
    assert_eq!(all.lines().filter(|line| line.contains(".png: is not an image")).count(), 500);

    let done =
        dir.ddpm(&with(&["--data", "images", "--steps=1", "--on-bad-file=skip", "--name=r"])).succeeds();
    assert!(done.err.contains("and 480 more") && done.err.lines().count() < 40, "{}", done.err);
    assert!(done.err.contains("skipped: all 500 are listed in runs/r/left-out.txt"), "{}", done.err);
    assert_eq!(fs::read_to_string(dir.path("runs/r/left-out.txt")).unwrap().lines().count(), 500);
    let done = dir.ddpm(&["data", "check", "images"]).fails(1, &[]);
    assert!(done.out.contains("and 480 more (--all lists them)"), "{}", done.out);
    let done = dir.ddpm(&["data", "check", "images", "--all"]).fails(1, &[]);
    assert!(done.out.contains("bad-499.png: "), "{}", done.out);
}

#[cfg(unix)]
#[test]
fn untrusted_names_are_escaped_and_quoted_in_commands() {
    let dir = TestDir::new();
    let name = "my \x1b[31mphotos\u{202e}";
    for i in 0..3 {
        image(&dir.path(format!("{name}/{i}.png")), 12, 12, 20 * i);
    }
    fs::write(dir.path(format!("{name}/x\nddpm: all is well.png")), "no image").unwrap();
    let args = ["--data", name, "--steps=1", "--on-bad-file=skip", "--name=my run"];
    let done = dir.ddpm(&with(&args)).succeeds();
    for text in [&done.err, &done.out, &fs::read_to_string(dir.path("runs/my run/README.md")).unwrap()] {
        assert!(!text.contains(['\x1b', '\u{202e}']), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("ddpm: all is well")), "{text}");
    }
    assert!(done.err.contains("my \\x1b[31mphotos\\u{202e}"), "{}", done.err);
    assert!(done.err.contains("x\\nddpm: all is well.png: is not an image"), "{}", done.err);
    assert!(done.err.contains("ddpm sample 'runs/my run' -n 64"), "{}", done.err);
    let done = dir.ddpm(&["data", "check", name]).fails(1, &[]);
    assert!(!done.out.contains(['\x1b', '\u{202e}']), "{:?}", done.out);
}
