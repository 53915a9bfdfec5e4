//! Training is a function of settings, data and seed: interruptions, resumes and the number of threads change no bit.

use ddpm::checkpoint::{self, Checkpoint};
use ddpm::config::Config;
use ddpm::config::open_data;
use ddpm::data::digits::Digits;
use ddpm::data::{AugmentKey, DataOptions, Dataset, Summary, open_within};
use ddpm::train::{Event, Init, Resume, Run, StepReport, Trainer};
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// No changes to the settings.
const PLAIN: &[(&str, &str)] = &[];
/// Every setting with its own state or with effects across the micro-batches of a step. Any mean loss that has not halved
/// counts as a plateau, so that the learning rate drops within a few steps.
const EVERYTHING: &[(&str, &str)] = &[
    ("diffusion.schedule", "cosine"),
    ("train.accumulate", "2"),
    ("loss.name", "huber"),
    ("loss.huber_delta", "0.7"),
    ("optimizer.name", "adamw"),
    ("optimizer.weight_decay", "0.1"),
    ("optimizer.clip_norm", "0.3"),
    ("lr_schedule.warmup_steps", "2"),
    ("lr_schedule.name", "plateau"),
    ("lr_schedule.plateau_patience", "0"),
    ("lr_schedule.plateau_factor", "0.5"),
    ("lr_schedule.plateau_threshold", "0.5"),
    ("diffusion.prediction", "v"),
    ("diffusion.learned_variance", "true"),
    ("loss.weighting", "snr-truncated"),
    ("loss.offset_noise", "0.1"),
    ("loss.input_perturbation", "0.1"),
    ("ema.schedule", "half-life"),
    ("ema.half_life", "100"),
    ("ema.power_widths", "0.05, 0.1"),
    ("attention.num_class_embeds", "10"),
    ("train.label_dropout", "0.3"),
];

const DOUBLE_CONV: &[(&str, &str)] = &[
    ("network.name", "double-conv"),
    ("double_conv.base_channels", "8"),
    ("double_conv.time_emb_dim", "16"),
    ("double_conv.dropout", "0.3"),
];
const SIMPLE: &[(&str, &str)] =
    &[("network.name", "simple"), ("simple.widths", "8, 12, 16"), ("simple.time_emb_dim", "16")];
const UNET2D: &[(&str, &str)] = &[
    ("network.name", "unet2d"),
    ("unet2d.layers_per_block", "1"),
    ("unet2d.block_out_channels", "8, 16"),
    ("unet2d.down_block_types", r#"["DownBlock2D", "AttnDownBlock2D"]"#),
    ("unet2d.up_block_types", r#"["AttnUpBlock2D", "UpBlock2D"]"#),
    ("unet2d.norm_num_groups", "4"),
    ("unet2d.dropout", "0.2"),
];

fn trainer_on(data: Box<dyn Dataset>, settings: &[(&str, &str)], threads: usize) -> Trainer {
    let threads = threads.to_string();
    let tiny = [
        ("attention.down_channels", "16, 32"),
        ("attention.mid_channels", "32, 16"),
        ("attention.down_sample", "true"),
        // Batches of seven pass over the twenty images more than once, and no epoch ends with a batch.
        ("train.batch_size", "7"),
        ("compute.threads", &threads),
    ];
    let pairs: Vec<_> = tiny.iter().chain(settings).map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    let config = Config::load(Some("digits"), None, &pairs).expect("settings");
    Trainer::new(&config, data).expect("a trainer")
}

fn trainer(settings: &[(&str, &str)], threads: usize) -> Trainer {
    trainer_on(Box::new(Digits::new(0, 16, 20).expect("digits")), settings, threads)
}

/// Trains with [`EVERYTHING`] on files that are decoded, cropped and flipped again on every read.
fn trainer_on_files(folder: &Path, network: &[(&str, &str)]) -> Trainer {
    let options = DataOptions {
        size: Some((16, 16)),
        random_crop_scale: Some([0.5, 1.0]),
        horizontal_flip: true,
        ..DataOptions::default()
    };
    let data = open_within(folder, &options, 0).expect("images");
    trainer_on(data, &[EVERYTHING, network].concat(), 2)
}

/// The state after `steps` more steps, and their reports.
fn train_steps(trainer: &mut Trainer, steps: usize) -> (Checkpoint, Vec<StepReport>) {
    let reports = (0..steps).map(|_| trainer.step().expect("a step")).collect();
    (trainer.checkpoint(None).expect("a state"), reports)
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!((a.manifest.step, a.manifest.plateau), (b.manifest.step, b.manifest.plateau));
    for (name, a, b) in [
        ("weights", &a.weights, &b.weights),
        ("averaged weights", &a.ema, &b.ema),
        ("first moments", &a.exp_avg, &b.exp_avg),
        ("second moments", &a.exp_avg_sq, &b.exp_avg_sq),
    ] {
        assert!(!a.is_empty(), "{name}");
        assert!(a == b, "the {name} differ");
    }
    assert!(a.averages == b.averages, "the other averages differ");
}

#[test]
fn a_resumed_run_ends_like_an_uninterrupted_one() {
    // With micro-batches, the third step ends an epoch, and the fourth is in the middle of one.
    for (settings, steps, stops) in [(PLAIN, 5, &[2][..]), (UNET2D, 3, &[1]), (EVERYTHING, 6, &[3, 4])] {
        let (whole, reports) = train_steps(&mut trainer(settings, 2), steps);
        for &stop in stops {
            let mut first = trainer(settings, 2);
            let (half, first_reports) = train_steps(&mut first, stop);
            let folder = tempfile::tempdir().expect("a folder");
            let path = checkpoint::save(folder.path(), &half).expect("a checkpoint");
            let mut second = trainer(settings, 2);
            second.restore(&checkpoint::load(&path).expect("the checkpoint"), &path).expect("fits");
            let (resumed, second_reports) = train_steps(&mut second, steps - stop);

            assert_eq!([first_reports, second_reports].concat(), reports, "stopped after {stop} steps");
            assert_same(&resumed, &whole);
        }
    }
}

#[test]
fn the_test_settings_use_all_state_that_a_resume_must_restore() {
    let mut trainer = trainer(EVERYTHING, 2);
    let (middle, mut reports) = train_steps(&mut trainer, 4);
    reports.extend(train_steps(&mut trainer, 2).1);
    let rates: Vec<f64> = reports.iter().map(|r| r.learning_rate).collect();
    assert!(rates[0] < rates[1], "no warm-up: {rates:?}");
    // Lowered both before and after the stops of the test above.
    assert!(rates[5] < rates[3] && rates[3] < rates[2], "the learning rate did not fall: {rates:?}");
    assert!(reports.iter().any(|r| r.grad_norm > 0.3), "nothing was clipped: {reports:?}");
    let plateau = middle.manifest.plateau.expect("the state of the learning rate");
    assert!(plateau.steps > 0 && plateau.loss_sum > 0.0 && plateau.best.is_some(), "{plateau:?}");
}

/// With augmentation, dropout, running statistics and everything else a step may depend on.
#[test]
fn augmentation_dropout_and_running_statistics_resume_exactly() {
    let images = tempfile::tempdir().expect("a folder");
    for i in 0..20u32 {
        let image = image::GrayImage::from_fn(20 + i, 18, |x, y| image::Luma([(x * y + 9 * i) as u8]));
        image.save(images.path().join(format!("{i:02}.png"))).expect("an image");
    }
    for network in [DOUBLE_CONV, SIMPLE, UNET2D] {
        let new = || trainer_on_files(images.path(), network);
        let (whole, reports) = train_steps(&mut new(), 5);
        let mut first = new();
        let (half, first_reports) = train_steps(&mut first, 2);
        let folder = tempfile::tempdir().expect("a folder");
        let path = checkpoint::save(folder.path(), &half).expect("a checkpoint");
        let mut second = new();
        // Timing a step runs the network but must not change anything.
        second.time_step(Duration::from_secs(5)).expect("a step").expect("its time");
        second.restore(&checkpoint::load(&path).expect("the checkpoint"), &path).expect("fits");
        let (resumed, second_reports) = train_steps(&mut second, 3);
        assert_eq!([first_reports, second_reports].concat(), reports, "{network:?}");
        assert_same(&resumed, &whole);
        // The same trainer, restored to an earlier step, reads the data from there again.
        first.restore(&half, Path::new("half")).expect("fits");
        assert_same(&train_steps(&mut first, 3).0, &whole);
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for settings in [PLAIN, EVERYTHING] {
        let (one, reports) = train_steps(&mut trainer(settings, 1), 3);
        for threads in [2, 5] {
            let (other, other_reports) = train_steps(&mut trainer(settings, threads), 3);
            assert_eq!(other_reports, reports, "{threads} threads");
            assert_same(&other, &one);
        }
    }
}

#[test]
fn fused_weight_updates_equal_separate_ones() {
    let attention: &[_] = &[("optimizer.name", "adamw")];
    let networks =
        [("double-conv", DOUBLE_CONV), ("simple", SIMPLE), ("unet2d", UNET2D), ("attention", attention)];
    for (name, network) in networks {
        let common = [("optimizer.weight_decay", "0.1"), ("ema.decay", "0.9"), ("ema.extra_decays", "0.5")];
        let settings = [&common[..], network].concat();
        // A threshold that no norm reaches: gradients are kept until the norm is known, but never clipped.
        let bounded = [&settings[..], &[("optimizer.clip_norm", "1e9")]].concat();
        let (mut separate, mut fused) = (trainer(&bounded, 2), trainer(&settings, 2));
        let arena = |t: &mut Trainer| t.executor().footprint().arena_bytes;
        assert!(arena(&mut fused) < arena(&mut separate), "{name}");
        let (want, reports) = train_steps(&mut separate, 3);
        for mut fused in [fused, trainer(&settings, 1)] {
            let (got, got_reports) = train_steps(&mut fused, 3);
            assert_eq!(got_reports, reports, "{name}");
            assert_same(&got, &want);
        }
    }
}

#[test]
fn micro_batches_have_their_own_images_and_random_numbers() {
    // Three micro-batches of seven see what three steps of seven see: with constant weights, the accumulated step reports
    // the mean of the losses of the single steps.
    let constant = ("optimizer.lr", "1e-300");
    let (_, single) = train_steps(&mut trainer(&[constant], 2), 6);
    let (_, accumulated) = train_steps(&mut trainer(&[constant, ("train.accumulate", "3")], 2), 2);
    for (step, accumulated) in accumulated.iter().enumerate() {
        let losses = single[3 * step..3 * step + 3].iter().map(|r| f64::from(r.loss));
        assert_eq!(accumulated.loss, (losses.sum::<f64>() / 3.0) as f32);
        let longest = single[3 * step..3 * step + 3].iter().map(|r| r.grad_norm).fold(0.0, f64::max);
        assert!(
            accumulated.grad_norm > 0.0 && accumulated.grad_norm < longest,
            "the norm of a mean does not exceed the largest norm"
        );
    }
}

/// A data set with the class order of earlier versions: by the bytes of the names.
struct Reordered(Box<dyn Dataset>, Vec<String>);

impl Dataset for Reordered {
    fn dims(&self) -> [usize; 4] {
        self.0.dims()
    }

    fn classes(&self) -> &[String] {
        &self.1
    }

    fn label(&self, index: usize) -> Option<u32> {
        let name = &self.0.classes()[self.0.label(index)? as usize];
        self.1.iter().position(|own| own == name).map(|i| i as u32)
    }

    fn read(&self, index: usize, draw: AugmentKey, out: &mut [f32]) -> ddpm::data::Result<()> {
        self.0.read(index, draw, out)
    }

    fn summary(&self) -> Cow<'_, Summary> {
        self.0.summary()
    }
}

#[test]
fn a_run_with_another_order_of_classes_resumes_to_the_same_bits() {
    let place = tempfile::tempdir().expect("a folder");
    let set = place.path().join("set");
    for (i, name) in ["1", "2", "10"].iter().enumerate() {
        std::fs::create_dir_all(set.join(name)).expect("a folder");
        for k in 0..3u8 {
            let image = image::GrayImage::from_pixel(16, 16, image::Luma([(80 * i) as u8 + 9 * k]));
            image.save(set.join(name).join(format!("{k}.png"))).expect("an image");
        }
    }
    let config = |steps: &str| {
        let path = set.to_string_lossy().into_owned();
        let settings = [
            ("attention.down_channels", "8, 16"),
            ("attention.mid_channels", "16, 8"),
            ("attention.down_sample", "true"),
            ("attention.num_class_embeds", "3"),
            ("data.path", &path),
            ("train.batch_size", "4"),
            ("optimizer.lr", "1e-2"),
            ("output.sample_count", "0"),
            ("train.steps", steps),
        ];
        let pairs: Vec<_> = settings.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Config::load(Some("digits"), None, &pairs).expect("settings")
    };
    // As in runs started when classes were sorted by their bytes.
    let (old, new) = (["1", "10", "2"].map(str::to_owned), ["1", "2", "10"].map(str::to_owned));
    let runs = place.path().join("runs");
    let start = |name: &str, classes: &[String], steps: &str| {
        let data = open_data(&config(steps)).expect("the data");
        assert_eq!(data.classes(), new);
        let data = Reordered(data, classes.to_vec());
        let trainer = Trainer::new(&config(steps), Box::new(data)).expect("a trainer");
        let mut run = Run::start(&runs, Some(name), trainer).expect("a run");
        run.train().expect("training");
    };
    start("whole", &old, "6");
    start("other", &new, "6");
    start("part", &old, "3");
    let more = |config: &mut Config| {
        *config = config.with_overrides(&[("train.steps".to_owned(), "6".to_owned())])?;
        Ok(())
    };
    let resume = Resume { checkpoint: None, change: &more, force: false };
    let mut run = Run::resume(&runs, Path::new("part"), &resume).expect("the run");
    let mut warnings = Vec::new();
    let mut on_event = |event: Event<'_>| {
        if let Event::Warning(text) = event {
            warnings.push(text);
        }
    };
    run.train_with(&Arc::default(), &mut on_event).expect("training");
    assert_eq!(warnings, Vec::<String>::new(), "the images are the same");
    let end = |name: &str| {
        let at = checkpoint::path_of(&runs.join(name).join("checkpoints"), 6);
        let Checkpoint { manifest, weights, .. } = checkpoint::load(&at).expect("a checkpoint");
        (manifest.classes, manifest.data, weights)
    };
    let (whole, part, other) = (end("whole"), end("part"), end("other"));
    assert_eq!(whole.0, old);
    assert!(whole == part, "the class indices differ");
    assert!(
        other.2 != whole.2 && other.1 == whole.1,
        "the order of the classes must matter for this test to be meaningful"
    );

    // A run initialized from these weights with the same classes uses the same indices.
    let init = Init { path: &runs.join("whole"), force: false };
    let (trainer, _) = Run::prepare(&config("9"), Some(init)).expect("a trainer");
    assert_eq!(trainer.class_names(), old);
}
