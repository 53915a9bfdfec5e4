use super::*;
use crate::checkpoint::sha256;
use crate::config::{DataFacts, Size};
use crate::objective::LossKind;
use crate::schedule::ScheduleKind;

fn runs() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("runs");
    (folder, root)
}

fn metrics(step: u64) -> Metrics {
    Metrics {
        step,
        loss: 0.5,
        images_per_second: 100.0,
        learning_rate: 1e-4,
        grad_norm: 2.5,
        seconds: step as f64,
    }
}

#[test]
fn unnamed_runs_are_numbered_even_when_many_start_at_once() {
    let (_folder, root) = runs();
    let mut all: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| RunFolder::create(&root, None).unwrap().name().to_owned()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 8);
    assert_eq!(all[0], "run-001");
    fs::create_dir(root.join("run-1041")).unwrap();
    let run = RunFolder::create(&root, None).unwrap();
    assert_eq!(run.name(), "run-1042");
    assert!(run.samples().is_dir() && run.checkpoints().is_dir());
    assert_eq!(run.sample_path(1000), root.join("run-1042/samples/step-0001000.png"));
}

#[test]
fn only_a_folder_whose_creation_was_interrupted_is_reused() {
    let root = tempfile::tempdir().unwrap();
    let create = || RunFolder::create(root.path(), Some("r"));
    let run = create().unwrap();
    drop(run.lock().unwrap());
    let again = create().unwrap();
    assert_eq!(again, run);
    // Another process that is creating it holds the lock.
    let held = run.lock().unwrap();
    assert!(again.lock().unwrap_err().to_string().contains("another process"));
    drop(held);
    for file in ["notes.txt", "samples/step-0000001.png"] {
        fs::write(run.path().join(file), "").unwrap();
        assert!(create().unwrap_err().to_string().contains("this run already exists"), "{file}");
        fs::remove_file(run.path().join(file)).unwrap();
    }
    run.write_config(&Config::load(None, None, &[]).unwrap()).unwrap();
    assert!(create().unwrap_err().to_string().contains("this run already exists"));
}

#[test]
fn a_taken_or_invalid_name_is_rejected_with_a_remedy() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, Some("cats")).unwrap();
    run.write_config(&Config::default()).unwrap();
    let message = RunFolder::create(&root, Some("cats")).unwrap_err().to_string();
    assert!(message.contains("--resume") && message.contains("--name"), "{message}");
    for name in ["", ".", "..", "a/b", "a\\b", "/tmp/x", "-n", ".hidden", "a\nb", &"x".repeat(101)] {
        let error = RunFolder::create(&root, Some(name)).unwrap_err();
        assert!(matches!(error, Error::Run { .. }), "{name:?}: {error}");
    }
    assert_eq!(names(&root), ["cats"]);
}

#[test]
fn an_unwritable_root_is_named() {
    let (folder, _) = runs();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for name in [None, Some("x")] {
        assert!(matches!(RunFolder::create(&file.join("runs"), name), Err(Error::Io { .. })));
    }
}

#[test]
fn runs_open_by_path_or_name_and_misspelt_names_get_a_suggestion() {
    let (folder, root) = runs();
    let made = RunFolder::create(&root, Some("cats")).unwrap();
    assert!(RunFolder::open(&root, Path::new("cats")).is_err(), "it has no settings yet");
    made.write_config(&Config::default()).unwrap();
    assert_eq!(RunFolder::open(&root, Path::new("cats")).unwrap(), made);
    assert_eq!(RunFolder::open(&root, made.path()).unwrap(), made);
    assert_eq!(RunFolder::open(&root, &made.samples().join("..")).unwrap().name(), "cats");
    let message = |run: &Path| RunFolder::open(&root, run).unwrap_err().to_string();
    assert!(message(Path::new("cast")).contains("did you mean"), "{}", message(Path::new("cast")));
    assert!(message(&root.join("cast")).contains("did you mean"));
    assert!(message(Path::new("qqqqqq")).contains("contains cats"));
    assert!(message(folder.path()).contains("is not a run"));
    assert!(message(Path::new("../runs/nothing")).contains("there is no such run"));
}

#[test]
fn a_run_is_trained_by_one_process_at_a_time() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, None).unwrap();
    let lock = run.lock().unwrap();
    let message = run.lock().unwrap_err().to_string();
    assert!(
        message.contains(&format!("another process (process {}) is training", std::process::id())),
        "{message}"
    );
    drop(lock);
    run.lock().unwrap();
}

#[test]
fn resolved_settings_are_saved_unchanged() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, None).unwrap();
    let facts = DataFacts { count: 1000, size: Size { height: 32, width: 16 }, channels: 3 };
    let config = Config::default().resolve(&facts).unwrap();
    run.write_config(&config).unwrap();
    assert_eq!(run.read_config().unwrap(), config);
    let wrong =
        Config { train: crate::config::TrainConfig { seed: u64::MAX, ..config.train.clone() }, ..config };
    assert!(run.write_config(&wrong).is_err());
}

#[test]
fn checkpoints_are_found_by_number_name_or_path() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, None).unwrap();
    let path = run.checkpoints().join("step-0001000");
    fs::create_dir(&path).unwrap();
    for name in ["1000", "step-1000", "step-0001000", path.to_str().unwrap()] {
        assert_eq!(run.find_checkpoint(name).unwrap(), path);
    }
    for name in ["2000", "", "x"] {
        assert!(run.find_checkpoint(name).unwrap_err().to_string().contains("available: step-0001000"));
    }
}

#[test]
fn resuming_drops_repeated_steps_and_a_truncated_line() {
    let (_folder, root) = runs();
    let path = RunFolder::create(&root, None).unwrap().metrics_path();
    let mut log = MetricsLog::open(&path, None).unwrap();
    for step in [1, 10, 20, 30] {
        log.append(&metrics(step)).unwrap();
    }
    log.append(&Metrics { loss: f64::NAN, ..metrics(40) }).unwrap();
    drop(log);
    assert!(read_metrics(&path).unwrap()[4].loss.is_nan());
    let mut file = File::options().append(true).open(&path).unwrap();
    file.write_all(b"{\"step\":50,\"lo").unwrap();
    assert_eq!(read_metrics(&path).unwrap().len(), 5);

    let mut log = MetricsLog::open(&path, None).unwrap();
    log.append(&metrics(50)).unwrap();
    assert_eq!(read_metrics(&path).unwrap().len(), 6);
    drop(log);
    let mut log = MetricsLog::open(&path, Some(19)).unwrap();
    log.append(&metrics(20)).unwrap();
    assert_eq!(read_metrics(&path).unwrap(), [metrics(1), metrics(10), metrics(20)]);
    assert_eq!(
        fs::read_to_string(&path).unwrap().lines().next(),
        Some(
            "{\"format\":2,\"step\":1,\"loss\":0.5,\"images_per_second\":100.0,\"learning_rate\":0.0001,\
             \"grad_norm\":2.5,\"seconds\":1.0}"
        )
    );
}

#[test]
fn metrics_of_older_versions_that_count_steps_from_0_are_converted() {
    let (_folder, root) = runs();
    let path = RunFolder::create(&root, None).unwrap().metrics_path();
    fs::write(&path, "{\"step\":3,\"loss\":0.5,\"images_per_second\":100.0,\"seconds\":3.0}\n").unwrap();
    let read = read_metrics(&path).unwrap();
    assert!(read[0].learning_rate.is_nan() && read[0].grad_norm.is_nan());
    let as_now = Metrics { learning_rate: 1e-4, grad_norm: 2.5, seconds: 4.0, ..read[0] };
    assert_eq!(as_now, metrics(4));
    drop(MetricsLog::open(&path, Some(3)).unwrap());
    assert!(read_metrics(&path).unwrap().is_empty(), "it was of the fourth step");

    // An old run that is resumed: one numbering in one file, no step repeated or missing.
    let old = |step: u64| {
        format!(
            "{{\"step\":{step},\"loss\":0.5,\"images_per_second\":100.0,\"learning_rate\":0.0001,\"grad_norm\":2.5,\"seconds\":{}.0}}\n",
            step + 1
        )
    };
    fs::write(&path, (0..5).map(old).collect::<String>()).unwrap();
    let mut log = MetricsLog::open(&path, Some(4)).unwrap();
    log.append(&metrics(5)).unwrap();
    let expected: Vec<Metrics> = (1..=5).map(metrics).collect();
    assert_eq!(read_metrics(&path).unwrap(), expected);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.lines().all(|line| line.starts_with("{\"format\":2,\"step\":")), "{text}");
    assert_eq!(metrics::last_metrics(&path, 3), expected, "a short file is read whole");
    // A file may contain lines of both formats.
    fs::write(&path, [old(0), text.lines().nth(1).unwrap().to_owned() + "\n"].concat()).unwrap();
    assert_eq!(read_metrics(&path).unwrap(), [metrics(1), metrics(2)]);
}

#[test]
fn missing_metrics_lines_are_reported() {
    let report =
        |steps: &[u64], done| missing_metrics(&steps.iter().map(|&s| metrics(s)).collect::<Vec<_>>(), done);
    assert_eq!(report(&[1, 2, 3], 3), None);
    assert_eq!(report(&[], 0), None);
    for (steps, part) in [
        (&[][..], "none of the 8 completed steps"),
        (&[1, 2, 3, 4, 5], "steps 6 to 8 of the 8"),
        (&[4, 5, 6, 7, 8], "steps 1 to 3 of the 8"),
        (&[1, 2, 4, 5, 6, 7, 8], "step 3 of the 8"),
        (&[2, 4, 6, 8], "lacks 4 of the 8 completed steps, starting with step 1"),
    ] {
        let text = report(steps, 8).unwrap();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_last_line_without_a_newline_counts_as_truncated() {
    let (_folder, root) = runs();
    let path = RunFolder::create(&root, None).unwrap().metrics_path();
    // Appending to it would corrupt both lines.
    MetricsLog::open(&path, None).unwrap().append(&metrics(1)).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    MetricsLog::open(&path, None).unwrap().append(&metrics(1)).unwrap();
    assert_eq!(read_metrics(&path).unwrap(), [metrics(1)]);
}

/// The settings of a run and the facts for its card.
fn card_facts() -> (Config, CardFacts) {
    let settings = [
        ("train.steps", "2000"),
        ("train.batch_size", "64"),
        ("attention.down_channels", "[32, 64, 64]"),
        ("attention.mid_channels", "[64, 64, 64]"),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = Config::load(Some("digits"), None, &settings).unwrap();
    let facts = CardFacts {
        parameters: 12345,
        classes: vec!["2".into(), "10".into(), "tabby `cat`\x1b[1m".into()],
        data: "100 images of cats|dogs".into(),
        steps: 1000,
        loss: Some(0.0312),
        seconds: Some(90.0),
        imported: false,
        has_ema: true,
        checkpoint: Some("checkpoints/step-0001000".into()),
    };
    (config, facts)
}

#[test]
fn the_card_explains_how_to_use_the_run() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, Some("cats")).unwrap();
    let (mut config, mut facts) = card_facts();
    write_card(&run, &config, &facts).unwrap();
    let text = fs::read_to_string(run.card_path()).unwrap();
    for part in [
        "# cats\n",
        "12345 parameters",
        "1000 of 2000 steps of 64 images",
        "mean squared error of the noise 0.03120",
        "T = 1000, linear schedule, beta from 0.0001 to 0.02\n",
        "1.5 minutes",
        &format!("ddpm sample {} -n 64 --seed 7", run.path().display()),
        "load_state_dict(load_file(\"checkpoints/step-0001000/ema.safetensors\"))",
        "| attention.down_channels | [32, 64, 64] |",
        "| train.epochs | unset |",
        "conditioned on one of 3 classes, in the order of their indices, from 0: `2`, `10`, `` tabby `cat`\\x1b[1m ``.\n",
        &format!("ddpm sample {} --class=2\n", run.path().display()),
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    // The settings of an imported run enable an average that it does not have yet.
    facts.has_ema = false;
    facts.checkpoint = None;
    write_card(&run, &config, &facts).unwrap();
    let text = fs::read_to_string(run.card_path()).unwrap();
    assert!(text.contains("model.safetensors") && !text.contains("ema.safetensors"));

    (config.loss.name, config.train.accumulate) = (LossKind::L1, 2);
    (config.diffusion.schedule, config.diffusion.zero_terminal_snr) = (ScheduleKind::Cosine, true);
    write_card(&run, &config, &facts).unwrap();
    let text = fs::read_to_string(run.card_path()).unwrap();
    for part in [
        "steps of 128 images, final mean absolute error of the noise",
        "T = 1000, cosine schedule, zero terminal SNR\n",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    facts.imported = true;
    write_card(&run, &config, &facts).unwrap();
    let text = fs::read_to_string(run.card_path()).unwrap();
    assert!(
        text.contains("Imported with ddpm") && text.contains("- Training: imported from another program"),
        "{text}"
    );
    assert!(!text.contains("steps of"), "{text}");
}

#[test]
fn an_edited_card_is_kept() {
    let (_folder, root) = runs();
    let run = RunFolder::create(&root, Some("cats")).unwrap();
    let (config, mut facts) = card_facts();
    write_card(&run, &config, &facts).unwrap();
    let text = fs::read_to_string(run.card_path()).unwrap();
    let own = format!("{text}\nTrained for the lecture of May.\n");
    fs::write(run.card_path(), &own).unwrap();
    assert!(card_is_edited(&run));
    facts.steps = 1500;
    write_card(&run, &config, &facts).unwrap();
    assert_eq!(fs::read_to_string(run.card_path()).unwrap(), own);
    assert!(run.path().join(NEW_CARD).is_file());
    // A card of an earlier version, which has no record, is replaced; so is one with a newer record.
    for cards in [Vec::new(), vec![sha256(text.as_bytes()), sha256(b"the next")]] {
        fs::write(run.card_path(), &text).unwrap();
        RunRecord { cards, ..RunRecord::read(run.path()) }.write(run.path()).unwrap();
        write_card(&run, &config, &facts).unwrap();
        assert_ne!(fs::read_to_string(run.card_path()).unwrap(), text);
    }
}
