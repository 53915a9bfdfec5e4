//! Training is a function of settings, data and seed: stopping, going on and the number of threads change no bit.

use ddpm::data::digits::Digits;
use ddpm::data::{DataOptions, Dataset, open_within};
use ddpm::train::Trainer;
use ddpm::train::checkpoint::{self, Checkpoint};
use ddpm::train::config::Config;
use std::path::Path;

fn trainer_on(data: Box<dyn Dataset>, threads: usize) -> Trainer {
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let settings = [
        set("network.down_channels", "16, 32"),
        set("network.mid_channels", "32, 16"),
        set("network.down_sample", "true"),
        // Five steps of seven pictures go through the twenty pictures more than once.
        set("train.batch_size", "7"),
        set("train.threads", &threads.to_string()),
    ];
    let config = Config::load(Some("digits"), None, &settings).expect("settings");
    Trainer::new(&config, data).expect("a trainer")
}

fn trainer(threads: usize) -> Trainer {
    trainer_on(Box::new(Digits::new(0, 16, 20).expect("digits")), threads)
}

/// Trains on files that are decoded, cropped and flipped anew at each reading.
fn trainer_on_files(folder: &Path) -> Trainer {
    let options = DataOptions {
        size: Some((16, 16)),
        random_crop_scale: Some([0.5, 1.0]),
        horizontal_flip: true,
        ..DataOptions::default()
    };
    trainer_on(open_within(folder, &options, 0).expect("pictures"), 2)
}

/// The state after `steps` more steps, and their losses.
fn go_on(trainer: &mut Trainer, steps: usize) -> (Checkpoint, Vec<f32>) {
    let losses = (0..steps).map(|_| trainer.step().expect("a step")).collect();
    (trainer.checkpoint(None).expect("a state"), losses)
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.manifest.step, b.manifest.step);
    for (name, a, b) in [
        ("weights", &a.weights, &b.weights),
        ("averaged weights", &a.ema, &b.ema),
        ("first moments", &a.exp_avg, &b.exp_avg),
        ("second moments", &a.exp_avg_sq, &b.exp_avg_sq),
    ] {
        assert!(!a.is_empty(), "{name}");
        assert!(a == b, "the {name} differ");
    }
}

#[test]
fn a_resumed_training_ends_like_one_that_was_not_stopped() {
    let (whole, losses) = go_on(&mut trainer(2), 5);

    let mut first = trainer(2);
    let (half, first_losses) = go_on(&mut first, 2);
    let folder = tempfile::tempdir().expect("a folder");
    let path = checkpoint::save(folder.path(), &half).expect("a checkpoint");
    let mut second = trainer(2);
    second.restore(&checkpoint::load(&path).expect("the checkpoint"), &path).expect("fits");
    let (resumed, second_losses) = go_on(&mut second, 3);

    assert_eq!([first_losses, second_losses].concat(), losses);
    assert_same(&resumed, &whole);
}

#[test]
fn augmentation_is_taken_up_where_it_was() {
    let pictures = tempfile::tempdir().expect("a folder");
    for i in 0..20u32 {
        let picture = image::GrayImage::from_fn(20 + i, 18, |x, y| image::Luma([(x * y + 9 * i) as u8]));
        picture.save(pictures.path().join(format!("{i:02}.png"))).expect("a picture");
    }
    let (whole, losses) = go_on(&mut trainer_on_files(pictures.path()), 5);
    let mut first = trainer_on_files(pictures.path());
    let (half, first_losses) = go_on(&mut first, 2);
    let mut second = trainer_on_files(pictures.path());
    second.restore(&half, Path::new("half")).expect("fits");
    let (resumed, second_losses) = go_on(&mut second, 3);
    assert_eq!([first_losses, second_losses].concat(), losses);
    assert_same(&resumed, &whole);
    // The same trainer, thrown back: it reads from there again.
    first.restore(&half, Path::new("half")).expect("fits");
    assert_same(&go_on(&mut first, 3).0, &whole);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (one, losses) = go_on(&mut trainer(1), 3);
    for threads in [2, 5] {
        let (other, other_losses) = go_on(&mut trainer(threads), 3);
        assert_eq!(other_losses, losses, "{threads} threads");
        assert_same(&other, &one);
    }
}
