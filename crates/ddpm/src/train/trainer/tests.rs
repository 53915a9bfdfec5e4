use super::*;
use crate::config::Size;
use crate::data::ImageShape;
use crate::data::digits::Digits;
use std::sync::atomic::Ordering;

fn trainer(settings: &[(&str, &str)]) -> Trainer {
    let tiny = [
        ("attention.down_channels", "8, 16"),
        ("attention.mid_channels", "16, 8"),
        ("attention.down_sample", "true"),
        ("attention.num_heads", "2"),
        ("train.batch_size", "4"),
    ];
    let pairs: Vec<_> = tiny.iter().chain(settings).map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    let config = Config::load(Some("digits"), None, &pairs).unwrap();
    Trainer::new(&config, Box::new(Digits::new(0, 16, 10).unwrap())).unwrap()
}

#[test]
fn clipping_only_scales_gradients_down() {
    assert_eq!((clip_scale(0.0, 1e9), clip_scale(1.0, 0.5), clip_scale(1.0, 0.0)), (1.0, 1.0, 1.0));
    assert_eq!(clip_scale(1.0, 4.0), 1.0 / 4.000001);
}

#[test]
fn labels_are_dropped_at_the_given_rate() {
    let all: Vec<u32> = (0..10_000).map(|i| i % 10).collect();
    let kept = |dropout, number| labels(&all, dropout, 1, number);
    assert!(kept(0.0, 0).iter().zip(&all).all(|(l, &label)| *l == label as f32));
    assert!(kept(1.0, 0).iter().all(|l| *l == NO_CLASS));
    let some = kept(0.1, 3);
    let dropped = some.iter().filter(|l| **l == NO_CLASS).count();
    // Four standard deviations for 10,000 labels.
    assert!(dropped.abs_diff(1000) < 120, "{dropped}");
    assert!(some == kept(0.1, 3) && some != kept(0.1, 4));
}

#[test]
fn an_epoch_ends_with_the_step_that_reads_its_last_image() {
    let ends = |accumulate: &str| {
        let trainer = trainer(&[("train.accumulate", accumulate)]);
        (0..6).map(|step| trainer.ends_epoch(step)).collect::<Vec<_>>()
    };
    // Ten images; 4, 8 or 12 per step.
    assert_eq!(ends("1"), [false, false, true, false, true, false]);
    assert_eq!(ends("2"), [false, true, true, true, true, false]);
    assert_eq!(ends("3"), [true; 6]);
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    // With L1, the loss grows linearly with the prediction and stays finite, but squared gradients do not.
    let mut trainer = trainer(&[("loss.name", "l1"), ("optimizer.clip_norm", "1")]);
    let mut weights = trainer.tensors(Region::Weights).unwrap();
    let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
    last.data.iter_mut().for_each(|w| *w *= 1e25);
    trainer.set_weights(&weights, Path::new("large")).unwrap();
    let error = trainer.step().unwrap_err();
    assert!(
        matches!(&error, Error::NotFinite { step: 1, what, .. } if what.contains("gradients")),
        "{error}"
    );
    assert_eq!((trainer.steps_done(), trainer.tensors(Region::Weights).unwrap()), (0, weights));
    assert!(trainer.tensors(Region::ExpAvg).unwrap().iter().all(|t| t.data.iter().all(|v| *v == 0.0)));
}

#[test]
fn a_step_that_fails_in_the_middle_of_its_updates_is_the_last() {
    // As above, but each weight is updated as soon as its gradient is computed: those of the last layer are finite.
    // There are so many more weights than activations that keeping all gradients would take more memory.
    let settings = [
        ("loss.name", "l1"),
        ("train.batch_size", "1"),
        ("attention.down_channels", "64, 128"),
        ("attention.mid_channels", "128, 64"),
    ];
    let mut trainer = trainer(&settings);
    let after_node = &trainer.exec.plan().updates().unwrap().after_node;
    assert!(
        after_node[..after_node.len() - 1].iter().any(|all| !all.is_empty()),
        "all are updated at the end"
    );
    trainer.step().unwrap();
    let good = trainer.checkpoint(None).unwrap();
    let mut weights = good.weights.clone();
    let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
    last.data.iter_mut().for_each(|w| *w *= 1e25);
    trainer.set_weights(&weights, Path::new("large")).unwrap();
    trainer.checkpoint(None).unwrap();
    let not_finite = |error: Error| match &error {
        Error::NotFinite { step: 2, what, .. } if what.contains("gradients") => {
            assert!(error.to_string().contains("with a lower learning rate"), "{error}");
        }
        other => panic!("{other}"),
    };
    not_finite(trainer.step().unwrap_err());
    let now = trainer.tensors(Region::Weights).unwrap();
    assert!(now != weights && now.iter().zip(&weights).any(|(a, b)| a == b), "not in the middle");
    // A partially updated state is neither saved nor trained further.
    not_finite(trainer.checkpoint(None).unwrap_err());
    not_finite(trainer.step().unwrap_err());
    assert_eq!(trainer.steps_done(), 1);

    trainer.restore(&good, Path::new("good")).unwrap();
    let mut other = self::trainer(&settings);
    other.step().unwrap();
    assert_eq!(trainer.step().unwrap(), other.step().unwrap());
    let (a, b) = (trainer.checkpoint(None).unwrap(), other.checkpoint(None).unwrap());
    assert!(a.weights == b.weights && a.exp_avg_sq == b.exp_avg_sq && a.ema == b.ema);
}

#[test]
fn a_step_with_all_updates_at_its_end_is_atomic() {
    let mut trainer = trainer(&[("loss.name", "l1"), ("train.batch_size", "64")]);
    let after_node = &trainer.exec.plan().updates().unwrap().after_node;
    assert!(after_node[..after_node.len() - 1].iter().all(Vec::is_empty), "some are updated earlier");
    let mut weights = trainer.tensors(Region::Weights).unwrap();
    let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
    last.data.iter_mut().for_each(|w| *w *= 1e25);
    trainer.set_weights(&weights, Path::new("large")).unwrap();
    let error = trainer.step().unwrap_err();
    assert!(
        matches!(&error, Error::NotFinite { step: 1, what, .. } if what.contains("gradients")),
        "{error}"
    );
    assert!(trainer.tensors(Region::Weights).unwrap() == weights);
    let checkpoint = trainer.checkpoint(None).unwrap();
    assert!(checkpoint.exp_avg.iter().all(|t| t.data.iter().all(|v| *v == 0.0)));
}

#[test]
fn computed_by_does_not_depend_on_the_number_of_threads() {
    let by = |threads| trainer(&[("compute.threads", threads), ("compute.device", "cpu")]).computed_by();
    assert_eq!(by("1"), by("2"));
    assert_eq!(by("1"), ddpm_engine_cpu::Isa::from_env().unwrap().name());
}

#[test]
fn slow_steps_of_presets_can_be_interrupted_until_their_end() {
    for (preset, size, channels) in
        [("cars", 64, 3), ("images", 128, 1), ("ddpm-cifar10", 32, 3), ("digits28", 28, 1)]
    {
        let config = Config::load(Some(preset), None, &[]).unwrap();
        let shape = ImageShape { height: size, width: size, channels };
        let mut config = config;
        config.data.size = Some(Size { height: size, width: size });
        config.data.channels = Some(channels);
        let Prepared { graph, options, .. } = Prepared::of(&config, shape, 1000).unwrap();
        // With clipping, all gradients are computed before the first update anyway.
        let whole = |exec: &dyn Executor| match exec.plan().updates() {
            Some(updates) => updates.after_node[..updates.after_node.len() - 1].iter().all(Vec::is_empty),
            None => true,
        };
        let exec =
            crate::hardware::Hardware::from(1).open().unwrap().executor(graph.graph, &options).unwrap();
        assert!(whole(&*exec), "{preset}: updates begin before the end");
    }
}

#[test]
fn an_interrupted_step_changes_nothing_and_repeats_to_the_same_bits() {
    let simple = [("network.name", "simple"), ("simple.widths", "8, 16"), ("simple.time_emb_dim", "16")];
    for settings in [&[][..], &[("train.accumulate", "2")], &[("optimizer.clip_norm", "0.1")], &simple] {
        let (mut whole, mut stopped) = (trainer(settings), trainer(settings));
        let stop = Arc::new(AtomicBool::new(false));
        stopped.set_stop(stop.clone());
        for _ in 0..3 {
            stop.store(true, Ordering::Relaxed);
            let before = stopped.checkpoint(None).unwrap();
            for _ in 0..2 {
                assert!(matches!(stopped.step(), Err(Error::Interrupted)));
            }
            let after = stopped.checkpoint(None).unwrap();
            assert!(before.weights == after.weights && before.exp_avg == after.exp_avg, "{settings:?}");
            stop.store(false, Ordering::Relaxed);
            assert_eq!(stopped.step().unwrap(), whole.step().unwrap(), "{settings:?}");
        }
        let (a, b) = (stopped.checkpoint(None).unwrap(), whole.checkpoint(None).unwrap());
        assert!(a.weights == b.weights && a.exp_avg_sq == b.exp_avg_sq && a.ema == b.ema, "{settings:?}");
    }
}

#[test]
fn batch_normalization_over_one_value_suggests_a_larger_batch_or_larger_images() {
    let config = |size: &str, batch: &str| {
        let settings = [
            ("network.name", "simple"),
            ("simple.widths", "8, 8, 8, 8, 8"),
            ("data.size", size),
            ("data.channels", "1"),
            ("train.batch_size", batch),
            ("train.accumulate", "3"),
        ];
        Config::load(Some("digits"), None, &settings.map(|(k, v)| (k.to_owned(), v.to_owned()))).unwrap()
    };
    let made = |size: usize, batch: &str| {
        let data = Digits::new(0, size, 10).unwrap();
        Trainer::new(&config(&size.to_string(), batch), Box::new(data)).map(drop).map_err(|e| e.to_string())
    };
    let error = made(16, "1").unwrap_err();
    for part in ["train.batch_size: is 1", "--batch-size 2", "--size 32x32"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(outline(&config("16", "1")).map(drop).unwrap_err().to_string(), error);
    made(16, "2").unwrap();
    made(32, "1").unwrap();
}

#[test]
fn a_loss_that_is_not_finite_changes_nothing() {
    let mut trainer = trainer(&[]);
    let mut weights = trainer.tensors(Region::Weights).unwrap();
    let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
    last.data.iter_mut().for_each(|w| *w *= 1e38);
    trainer.set_weights(&weights, Path::new("large")).unwrap();
    let error = trainer.step().unwrap_err();
    assert!(matches!(&error, Error::NotFinite { step: 1, what, .. } if what == "the loss"), "{error}");
    assert_eq!(trainer.tensors(Region::Weights).unwrap(), weights);
    let checkpoint = trainer.checkpoint(None).unwrap();
    assert!(checkpoint.exp_avg.iter().all(|t| t.data.iter().all(|v| *v == 0.0)));
}

#[test]
fn power_averages_cannot_be_started_in_the_middle_of_a_run() {
    let mut plain = trainer(&[]);
    let with = |added: &str| trainer(&[("ema.power_widths", added), ("ema.extra_decays", "0.5")]);
    let first = plain.checkpoint(None).unwrap();
    with("0.05").restore(&first, Path::new("first")).unwrap();
    plain.step().unwrap();
    let later = plain.checkpoint(None).unwrap();
    let error = with("0.05").restore(&later, Path::new("later")).unwrap_err().to_string();
    for part in ["ema.power_widths: 0.05 is not kept in later", "cannot be added after 1 steps", "--init"] {
        assert!(error.contains(part), "{error}");
    }
    // EMAs forget their initial value.
    with("").restore(&later, Path::new("later")).unwrap();
}

#[test]
fn every_average_uses_its_own_decay() {
    let settings = [
        ("ema.schedule", "fixed"),
        ("ema.decay", "0.5"),
        ("ema.extra_decays", "0.5, 0.9"),
        ("ema.power_widths", "0.05, 0.2"),
    ];
    let mut trainer = trainer(&settings);
    let flat = |tensors: &[NamedTensor]| -> Vec<f64> {
        tensors.iter().flat_map(|t| &t.data).map(|x| f64::from(*x)).collect()
    };
    let mut weights = vec![flat(&trainer.tensors(Region::Weights).unwrap())];
    for _ in 0..4 {
        trainer.step().unwrap();
        weights.push(flat(&trainer.tensors(Region::Weights).unwrap()));
    }
    let checkpoint = trainer.checkpoint(None).unwrap();
    let names: Vec<&str> = checkpoint.averages.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ema-0.5", "ema-0.9", "power-0.05", "power-0.2"]);
    let want = |decay: &dyn Fn(i32) -> f64| {
        let mut average = weights[0].clone();
        for (t, weights) in (1..).zip(&weights[1..]) {
            average.iter_mut().zip(weights).for_each(|(a, w)| *a = decay(t) * *a + (1.0 - decay(t)) * w);
        }
        average
    };
    // gamma of a relative width, as the root of a cubic (Karras et al. 2024, appendix C).
    let power = |width: f64| {
        let cubic = |g: f64| ((g + 7.0) * g + 16.0 - width.powi(-2)) * g + 12.0 - width.powi(-2);
        let (mut low, mut high) = (0.0, 100.0);
        for _ in 0..100 {
            let middle = 0.5 * (low + high);
            if cubic(middle) < 0.0 { low = middle } else { high = middle }
        }
        low
    };
    let of_power = |width: f64, t: i32| (1.0 - 1.0 / f64::from(t)).powf(power(width) + 1.0);
    let wanted = [want(&|_| 0.5), want(&|_| 0.9), want(&|t| of_power(0.05, t)), want(&|t| of_power(0.2, t))];
    for ((name, got), want) in checkpoint.averages.iter().zip(&wanted) {
        let error = flat(got).iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        // Four roundings of values up to about 1.
        assert!(error < 5e-7, "{name}: {error}");
    }
    let error = flat(&checkpoint.ema).iter().zip(&wanted[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(error < 5e-7, "the executor's: {error}");
}
