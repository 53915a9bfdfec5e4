//! What goes wrong is told with its place and the way out, and leaves what was good as it was.

use crate::support::{Place, TINY, image, losses, names, state};
use std::fs;

/// A whole run: network and data are given, but neither name nor steps.
fn with(more: &[&'static str]) -> Vec<&'static str> {
    [&["train"], &TINY[..], more].concat()
}

#[cfg(unix)]
#[test]
fn a_checkpoint_that_cannot_be_written_to_its_end_leaves_the_older_ones() {
    let place = Place::new();
    place.train("r", 4, 2, &[]).well();
    let before = state(&place.checkpoint("r", 4));
    // The optimizer's file is twice the model's. In `ulimit -f` a block has 512 bytes.
    let model = fs::metadata(place.checkpoint("r", 4).join("model.safetensors")).unwrap().len();
    let blocks = model * 3 / 2 / 512;
    let resume = "exec \"$ddpm\" train --resume r --steps 8";
    let done = place.shell(&format!("ulimit -f {blocks}; {resume}"));
    let told = ["step-0000006", "optimizer.safetensors: cannot write the checkpoint", "are whole", "resume"];
    let done = done.fails(1, &told);
    assert_eq!(done.err.matches("os error").count(), 1, "{}", done.err);
    assert_eq!(names(&place.path("runs/r/checkpoints")), ["best.json", "step-0000002", "step-0000004"]);
    assert!(state(&place.checkpoint("r", 4)) == before);
    place.assert_intact("r", 2);
    place.assert_intact("r", 4);

    // With room again it goes on as if nothing had been.
    place.ddpm(&["train", "--resume", "r", "--steps", "8"]).well();
    place.train("whole", 8, 2, &[]).well();
    assert!(state(&place.checkpoint("r", 8)) == state(&place.checkpoint("whole", 8)));
    assert_eq!(losses(&place.path("runs/r")), losses(&place.path("runs/whole")));
}

#[cfg(unix)]
#[test]
fn a_limit_of_the_file_size_is_an_error_as_a_full_disk_is() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    place
        .shell("ulimit -f 0; exec \"$ddpm\" sample r -n 2 --steps 2")
        .fails(1, &["cannot write", "File too large"]);
    let table = "ulimit -f 0; exec \"$ddpm\" eval r --nll -n 2 --terms 2";
    place.shell(table).fails(1, &["nll.csv: cannot write", "File too large"]);
    // What is printed is written to a file, too.
    place.shell("ulimit -f 1; exec \"$ddpm\" config > settings.toml").fails(1, &["File too large"]);
    let train = crate::support::train("n", 1, 0, &[]).join("' '");
    place
        .shell(&format!("ulimit -f 0; exec \"$ddpm\" '{train}'"))
        .fails(1, &["cannot write", "File too large"]);
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    place
        .ddpm(&with(&["--steps", "1", "--runs", "file/runs"]))
        .fails(1, &["file/runs: cannot make the run's folder"]);
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    fs::create_dir(place.path("locked")).unwrap();
    fs::set_permissions(place.path("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(place.path("locked/probe"), "").is_ok() {
        return; // root writes everywhere
    }
    place
        .ddpm(&with(&["--steps", "1", "--runs", "locked/runs"]))
        .fails(1, &["locked/runs: cannot make the run's folder"]);
}

#[test]
fn all_broken_images_are_listed_and_can_be_left_out() {
    let place = Place::new();
    for i in 0..8 {
        image(&place.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    let whole = fs::read(place.path("images/0.png")).unwrap();
    fs::write(place.path("images/cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(place.path("images/text.png"), "This is no image.\n").unwrap();
    fs::write(place.path("images/nothing.jpg"), "").unwrap();
    let train =
        |more: &[&'static str]| place.ddpm(&with(&[&["--data", "images", "--steps=1"], more].concat()));
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
    assert!(!place.path("runs").exists());
    let done = train(&["--on-bad-file", "skip"]).well();
    for part in ["8 images, 12x12 grey", "left out ", "cut.png", "text.png", "nothing.jpg"] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    place.assert_intact("run-001", 1);
}

#[test]
fn data_that_is_none_is_refused_with_what_was_looked_for() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    fs::create_dir(place.path("photos")).unwrap();
    let train = |data: &'static str| place.ddpm(&with(&["--steps", "1", "--data", data]));
    train("empty").fails(1, &["empty: no images here (it is empty)", ".png"]);
    train("photo").fails(1, &["photo: there is no such file or folder; did you mean", "photos?"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn images_of_several_sizes_ask_for_one() {
    let place = Place::new();
    for (i, height, width) in [(0, 12, 12), (1, 12, 12), (2, 24, 16)] {
        image(&place.path(format!("images/{i}.png")), height, width, 80);
    }
    let flags: Vec<&str> = TINY.into_iter().filter(|f| !f.contains("data.size")).collect();
    let train = [&["train", "--data", "images", "--steps=1"], &flags[..]].concat();
    // The first preset has a size of its own; a file of settings does without.
    fs::write(place.path("plain.toml"), "").unwrap();
    let train = [&train[..], &["--config", "plain.toml"]].concat();
    place
        .ddpm(&train)
        .fails(1, &["the images have 2 sizes", "12x12 (2 images)", "24x16 (1 image)", "--size H"]);
    place.ddpm(&[&train[..], &["--size", "12x16"]].concat()).well();
}

#[test]
fn sizes_that_cannot_be_halved_are_refused_with_those_that_can() {
    let place = Place::new();
    place.ddpm(&with(&["--steps=1", "--size=13"])).fails(1, &["data.size: 13x13", "12x12 or 14x14"]);
    let simple = ["--set=network.name=simple", "--set=simple.widths=[8,8,8]", "--steps=1"];
    for (size, said) in [("33", "use 32x32 or 36x36"), ("35", "use 36x36 or 32x32"), ("2x3", "use 4x4")] {
        place.ddpm(&with(&[&simple[..], &["--size", size]].concat())).fails(1, &[said]);
    }
    image(&place.path("images/a.png"), 21, 30, 80);
    fs::write(place.path("plain.toml"), "[attention]\ndown_sample = [true, true, false]\n").unwrap();
    place
        .ddpm(&["train", "--config", "plain.toml", "--data", "images", "--steps=1"])
        .fails(1, &["21x30 cannot be divided by 4", "20x28 or 24x32", "--size"]);
}

#[test]
fn numbers_that_leave_the_finite_ones_stop_the_training_before_the_checkpoint_is_touched() {
    let place = Place::new();
    place.train("r", 3, 1, &[]).well();
    let before = state(&place.checkpoint("r", 3));
    // Each step multiplies the weights by 1 - lr * weight_decay.
    let explode = ["--lr=10", "--set=train.optimizer=adamw", "--set=train.weight_decay=1000"];
    let resume = ["train", "--resume", "r", "--steps=100", "--set=train.checkpoint_every=100"];
    let done = place.ddpm(&[&resume[..], &explode].concat());
    done.fails(
        1,
        &[
            "step ",
            "is not a finite number",
            "Go on from step 3",
            "ddpm train --resume runs/r --checkpoint 3 --lr 2e-4",
        ],
    );
    assert!(state(&place.checkpoint("r", 3)) == before);
    place.assert_intact("r", 3);

    // It goes on from there, with the settings of before, as if nothing had been.
    place.ddpm(&["train", "--resume", "r", "--steps=6"]).well();
    place.train("whole", 6, 1, &[]).well();
    assert!(state(&place.checkpoint("r", 6)) == state(&place.checkpoint("whole", 6)));
    place.ddpm(&with(&["--lr=1e30"])).fails(2, &["--lr", "above 0 and at most 10"]);
    let refused = ["train.lr: 99 is out of range; give a number above 0 and at most 10"];
    place.ddpm(&with(&["--set=train.lr=99"])).fails(1, &refused);
}

#[test]
fn no_good_checkpoint_is_promised_where_there_is_none() {
    let place = Place::new();
    let explode = ["--lr=10", "--set=train.optimizer=adamw", "--set=train.weight_decay=1000"];
    let done = place.train("none", 100, 0, &explode);
    done.fails(
        1,
        &["is not a finite number", "There is no checkpoint yet: train again from the start", "--lr 2e-4"],
    );
    // With one every step, the last of them is that of weights that have left what is good.
    let done = place.train("bad", 100, 1, &explode);
    done.fails(
        1,
        &["is not a finite number", "have diverged as well: train again from the start", "--lr 2e-4"],
    );
}

#[test]
fn a_training_that_has_diverged_does_not_end_well() {
    let place = Place::new();
    let done = place.train("r", 30, 10, &["--lr=3"]).fails(
        1,
        &[
            "warning: step ",
            "the training diverges",
            "all steps are made, but the training diverged: the loss is ",
            "--lr 2e-4",
        ],
    );
    assert!(done.err.contains("predicting nothing has about 1.0000"), "{}", done.err);
    // All is there to look at.
    place.assert_intact("r", 30);

    // From a good start there is a way back.
    place.train("s", 40, 20, &[]).well();
    let args = ["train", "--resume", "s", "--steps=80", "--lr=1"];
    place
        .ddpm(&args)
        .fails(1, &["diverged", "Go on from step 40", "--resume runs/s --checkpoint 40 --lr 2e-4"]);
    place.ddpm(&["train", "--resume", "s", "--checkpoint", "40", "--lr", "2e-4", "--steps", "60"]).well();
}

#[test]
fn given_weights_that_are_far_too_large_are_told_at_the_first_step() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    let bytes = fs::read(place.checkpoint("r", 1).join("model.safetensors")).unwrap();
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
    fs::write(place.path("large.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let init = |more: &[&'static str]| {
        place.ddpm(&with(&[&["--name=n", "--steps=2", "--init", "large.safetensors"], more].concat()))
    };
    init(&[]).fails(
        1,
        &["step 1: the loss is not a finite number", "look at the weights that it starts from (--init)"],
    );
    place.assert_intact("n", 0);
}

#[test]
fn a_run_from_given_weights_keeps_them_until_its_first_checkpoint() {
    let place = Place::new();
    place.train("r", 2, 0, &["--seed=7"]).well();
    let weights = place.checkpoint("r", 2).join("model.safetensors");
    let init = weights.display().to_string();
    place.train("whole", 3, 0, &["--init", &init]).well();
    place.assert_intact("whole", 0);
    assert_eq!(
        fs::read(place.checkpoint("whole", 0).join("ema.safetensors")).unwrap(),
        fs::read(weights).unwrap()
    );
    // Back to the beginning, as a run is that was killed before its first checkpoint.
    fs::rename(place.path("runs/whole"), place.path("runs/again")).unwrap();
    let expected = state(&place.checkpoint("again", 3));
    fs::remove_dir_all(place.checkpoint("again", 3)).unwrap();
    place.ddpm(&["train", "--resume", "again"]).well();
    assert!(state(&place.checkpoint("again", 3)) == expected);
}

#[test]
fn weights_of_another_network_are_named_with_both_shapes() {
    let place = Place::new();
    place.train("r", 2, 1, &[]).well();
    let (wide, file) = (
        ["--set=attention.down_channels=[8, 16]", "--set=attention.mid_channels=[16, 8]"],
        "model.safetensors",
    );
    place.train("wide", 2, 1, &wide).well();
    let weights = place.checkpoint("wide", 2).join(file);

    let init = place.train("n", 1, 0, &["--init", &weights.display().to_string()]);
    init.fails(
        1,
        &[file, "another network's weights", "downs.0.", "the network's is [8", "the network's settings"],
    );
    assert!(!place.path("runs/n").exists());

    let resume = [&["train", "--resume", "r", "--steps=3"], &wide[..]].concat();
    place
        .ddpm(&resume)
        .fails(1, &["step-0000002", "attention.down_channels = [8, 8] (now [8, 16])", "--force"]);
    let forced = [&resume[..], &["--force"]].concat();
    place.ddpm(&forced).fails(1, &["step-0000002", "another network's weights", "is [8", "network's is [16"]);
    place.assert_intact("r", 2);

    // Another network's file in a checkpoint is damage: named by it is refused, else the one before is taken.
    fs::copy(&weights, place.checkpoint("r", 2).join(file)).unwrap();
    place
        .ddpm(&["sample", "r", "-n1", "--weights=raw", "--checkpoint=2"])
        .fails(1, &["step-0000002: model.safetensors: ", "--checkpoint step-0000001"]);
    place
        .ddpm(&["train", "--resume", "r", "--checkpoint=2"])
        .fails(1, &["step-0000002: model.safetensors: ", "--checkpoint step-0000001"]);
    let done = place.ddpm(&["train", "--resume", "r"]).well();
    assert!(done.err.contains("warning: runs/r/checkpoints/step-0000002 is damaged"), "{}", done.err);
    place.train("whole", 2, 1, &[]).well();
    assert!(state(&place.checkpoint("r", 2)) == state(&place.checkpoint("whole", 2)));
}

#[test]
fn slips_of_the_fingers_are_answered_with_what_was_meant() {
    let place = Place::new();
    let refused = |args: &[&str], parts: &[&str]| {
        place.ddpm(&[&["train"], args].concat()).fails(1, parts);
    };
    refused(&["--set", "train.bach_size=3"], &["train.bach_size: no such setting; did you mean batch_size?"]);
    refused(&["--set", "batch_size=3"], &["did you mean train.batch_size?"]);
    refused(&["--set", "train.keep"], &["write KEY=VALUE"]);
    refused(&["--preset", "digit"], &["there is no preset \"digit\"; did you mean digits?"]);
    refused(&["--on-bad-file", "ignore"], &["data.on_bad_file: ", "fail", "skip"]);
    refused(&["--size", "big"], &["data.size: ", "expected one side in pixels or [height, width]"]);
    refused(&["--resume", "r"], &["r: there is no such run, nor any in runs"]);
    fs::write(place.path("mine.toml"), "[train]\nsteps = 3\nleaning_rate = 1\n").unwrap();
    refused(&["--config", "mine.toml"], &["mine.toml: line 3: train.leaning_rate: no such setting"]);
    fs::write(place.path("mine.toml"), "[netwrk]\nnum_heads = 2\n").unwrap();
    refused(
        &["--config", "mine.toml"],
        &["mine.toml: line 2: netwrk.num_heads: no such setting; did you mean attention"],
    );
    refused(&["--config", "their.toml"], &["their.toml: cannot read the settings"]);
    assert!(!place.path("runs").exists());
    place.ddpm(&["bench", "--set", "train.keep"]).fails(1, &["write KEY=VALUE"]);
    place.ddpm(&["train", "--stpes", "3"]).fails(2, &["--steps"]);
    place.ddpm(&["trian"]).fails(2, &["train"]);
    place.ddpm(&["train", "--steps", "many"]).fails(2, &["--steps", "many"]);
    place.ddpm(&["train", "--checkpoint", "3"]).fails(2, &["--resume"]);
}

#[test]
fn a_run_is_never_written_over() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    let (before, config) =
        (state(&place.checkpoint("r", 1)), fs::read(place.path("runs/r/config.toml")).unwrap());
    place
        .train("r", 2, 0, &["--seed", "1"])
        .fails(1, &["runs/r: there is such a run already", "--resume runs/r", "another --name"]);
    assert!(state(&place.checkpoint("r", 1)) == before);
    assert_eq!(fs::read(place.path("runs/r/config.toml")).unwrap(), config);
    place.ddpm(&with(&["--steps=1", "--name=a/b"])).fails(1, &["\"a/b\" cannot be a folder here"]);
    // Without a name they are numbered.
    for number in ["run-001", "run-002"] {
        place.ddpm(&with(&["--steps=1"])).well();
        place.assert_intact(number, 1);
    }
}

#[cfg(unix)]
#[test]
fn two_processes_do_not_train_one_run() {
    let place = Place::new();
    let mut first = place.spawn(&crate::support::train("r", 1_000_000, 0, &[]));
    while !place.path("runs/r/metrics.jsonl").exists() {
        assert!(first.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let who = format!("another process (process {}) is training this run", first.id());
    place.ddpm(&["train", "--resume", "r"]).fails(1, &["runs/r: ", &who]);
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn a_run_taken_up_with_other_images_is_told() {
    let place = Place::new();
    for i in 0..6 {
        image(&place.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    place.train("r", 2, 0, &["--data", "images"]).well();
    let same = place.ddpm(&["train", "--resume", "r", "--steps=3"]).well();
    assert!(!same.err.contains("warning"), "{}", same.err);
    image(&place.path("images/5.png"), 12, 12, 200);
    let other = place.ddpm(&["train", "--resume", "r", "--steps=4"]).well();
    assert!(other.err.contains("warning: the images are not those"), "{}", other.err);
    // From then on these are the run's.
    let same = place.ddpm(&["train", "--resume", "r", "--steps=5"]).well();
    assert!(!same.err.contains("warning"), "{}", same.err);
}

#[test]
fn a_device_that_is_not_there_is_told_with_what_to_do() {
    let place = Place::new();
    // Another GPU than any machine has, so that it is missing with the feature `cuda`, too.
    place
        .ddpm(&with(&["--steps", "1", "--device", "cuda:99", "--name", "r"]))
        .fails(1, &["cuda:99", "--device cpu"]);
    place.ddpm(&with(&["--steps", "1", "--set", "train.device=gpu"])).fails(1, &["train.device", "cuda:1"]);
    place.ddpm(&["train", "--device", "tpu"]).fails(2, &["tpu", "auto, cpu, cuda"]);
    place.ddpm(&with(&["--steps", "1", "--device", "cpu", "--name", "r"])).well();
}

#[test]
fn a_list_of_thousands_is_cut_and_a_file_has_all_of_it() {
    let place = Place::new();
    for i in 0..3 {
        image(&place.path(format!("images/{i}.png")), 12, 12, 20 * i);
    }
    for i in 0..500 {
        fs::write(place.path(format!("images/bad-{i:03}.png")), "no image").unwrap();
    }
    let done = place.ddpm(&with(&["--data", "images", "--steps=1"])).fails(
        1,
        &["500 files cannot be read as images:", "bad-019.png: ", "and 480 more", "--on-bad-file skip"],
    );
    assert!(done.err.lines().count() < 30 && !done.err.contains("bad-020.png"), "{}", done.err);
    let list = done.err.split_once("all 500 are listed in ").expect("a file").1.trim();
    let all = fs::read_to_string(list).unwrap();
    fs::remove_file(list).unwrap();
    assert_eq!(all.lines().filter(|line| line.contains(".png: is not an image")).count(), 500);

    let done = place.ddpm(&with(&["--data", "images", "--steps=1", "--on-bad-file=skip", "--name=r"])).well();
    assert!(done.err.contains("and 480 more") && done.err.lines().count() < 40, "{}", done.err);
    assert!(done.err.contains("left out: all 500 are listed in runs/r/left-out.txt"), "{}", done.err);
    assert_eq!(fs::read_to_string(place.path("runs/r/left-out.txt")).unwrap().lines().count(), 500);
    let done = place.ddpm(&["data", "check", "images"]).fails(1, &[]);
    assert!(done.out.contains("and 480 more (--all lists them)"), "{}", done.out);
    let done = place.ddpm(&["data", "check", "images", "--all"]).fails(1, &[]);
    assert!(done.out.contains("bad-499.png: "), "{}", done.out);
}

#[cfg(unix)]
#[test]
fn names_from_outside_do_nothing_to_the_terminal_and_are_quoted_in_commands() {
    let place = Place::new();
    let name = "my \x1b[31mphotos\u{202e}";
    for i in 0..3 {
        image(&place.path(format!("{name}/{i}.png")), 12, 12, 20 * i);
    }
    fs::write(place.path(format!("{name}/x\nddpm: all is well.png")), "no image").unwrap();
    let args = ["--data", name, "--steps=1", "--on-bad-file=skip", "--name=my run"];
    let done = place.ddpm(&with(&args)).well();
    for text in [&done.err, &done.out, &fs::read_to_string(place.path("runs/my run/README.md")).unwrap()] {
        assert!(!text.contains(['\x1b', '\u{202e}']), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("ddpm: all is well")), "{text}");
    }
    assert!(done.err.contains("my \\x1b[31mphotos\\u{202e}"), "{}", done.err);
    assert!(done.err.contains("x\\nddpm: all is well.png: is not an image"), "{}", done.err);
    assert!(done.err.contains("ddpm sample 'runs/my run' -n 64"), "{}", done.err);
    let done = place.ddpm(&["data", "check", name]).fails(1, &[]);
    assert!(!done.out.contains(['\x1b', '\u{202e}']), "{:?}", done.out);
}
