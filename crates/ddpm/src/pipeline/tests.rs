use super::*;
use crate::data::DataOptions;

#[test]
fn wanted_batches_are_passed_on_as_they_are_sampled() {
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let settings = [
        set("attention.down_channels", "8, 8"),
        set("attention.mid_channels", "8, 8"),
        set("attention.down_sample", "true"),
        set("data.size", "16"),
        set("data.channels", "1"),
    ];
    let config = Config::load(Some("digits"), None, &settings).unwrap();
    let data = crate::data::digits::Digits::new(0, 16, 4).unwrap();
    let trainer = crate::train::Trainer::new(&config, Box::new(data)).unwrap();
    let weights = trainer.tensors(ddpm_engine::Region::Weights).unwrap();
    let pipeline = Pipeline::new(&config, weights, Path::new("run"), 1).unwrap();
    let request = SampleRequest { count: 11, ..SampleRequest::default() };
    let sample = |batch: usize, wanted: &dyn Fn(usize) -> bool| {
        let (mut sampled, mut passed_on) = (Vec::new(), Vec::new());
        let sampler: &mut BatchSampler<'_> = &mut |denoiser, key| {
            sampled.push(key.first as usize);
            Ok(vec![key.first as f32; denoiser.batch() * 256])
        };
        let done = &mut |first: usize, x: &[f32]| {
            assert!(x.iter().all(|&v| v == first as f32));
            passed_on.push((first, x.len() / 256));
            Ok(())
        };
        pipeline.for_each_batch(request, batch, wanted, sampler, done).unwrap();
        assert!(sampled.into_iter().eq(passed_on.iter().map(|p| p.0)));
        passed_on
    };
    assert_eq!(sample(4, &|_| true), [(0, 4), (4, 4), (8, 3)]);
    assert_eq!(sample(4, &|i| i == 2 || i > 6), [(2, 4), (7, 4)]);
    assert_eq!(sample(4, &|_| false), []);
    // An error from `done` stops sampling.
    let full = pipeline.for_each_batch(
        request,
        4,
        &|_| true,
        &mut |denoiser, _| Ok(vec![0.0; denoiser.batch() * 256]),
        &mut |first, _| if first == 4 { Err(Error::Interrupted) } else { Ok(()) },
    );
    assert!(matches!(full, Err(Error::Interrupted)));
}

/// A run with three classes.
fn named(names: &[&str]) -> Pipeline {
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let settings =
        [set("attention.num_class_embeds", "3"), set("data.size", "16"), set("data.channels", "1")];
    let config = Config::load(Some("digits"), None, &settings).unwrap();
    let pipeline = Pipeline::new(&config, Vec::new(), Path::new("run"), 1).unwrap();
    Pipeline { class_names: names.iter().map(|n| (*n).to_owned()).collect(), ..pipeline }
}

#[test]
fn a_class_is_found_by_index_only_on_request() {
    let of = |names: &[&str], asked: &str| named(names).class(asked).map_err(|e| e.to_string());
    let months = ["01", "02", "10"];
    assert_eq!(of(&months, "02"), Ok(1));
    assert_eq!(of(&months, "#1"), Ok(1));
    let error = of(&months, "1").unwrap_err();
    for part in [
        "there is no class \"1\"; did you mean \"01\"?",
        "? The run has the classes 01, 02, 10",
        "at the index 1 is \"02\": --class=#1",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(of(&months, "7").unwrap_err().ends_with("the classes 01, 02, 10"));
    assert!(of(&months, "#3").unwrap_err().contains("indices go from 0 to 2"));
    // Names that look like other classes' indices.
    assert_eq!(of(&["2", "0", "1"], "2"), Ok(0));
    // `#n` is always an index, whatever the names, so the advice to give an index works.
    assert_eq!((of(&["#2", "#0", "x"], "#2"), of(&["#2", "#x", "x"], "#x")), (Ok(2), Ok(1)));
    for wrong in ["", "#", "#-1", "# 1", "+1", "1.0", "Cat ", "1e0"] {
        assert!(of(&["ant", "bee", "cat"], wrong).is_err(), "{wrong:?}");
    }
    assert!(of(&["ant", "bee", "cat"], "Bee").unwrap_err().contains("did you mean \"bee\"?"));
    let error = of(&["a\u{fffd}", "a\u{fffd}", "b"], "a\u{fffd}").unwrap_err();
    assert!(error.contains("--class=#0 or --class=#1"), "{error}");
    // Imported weights have no class names.
    assert_eq!((of(&[], "1"), of(&[], "#2")), (Ok(1), Ok(2)));
    assert!(of(&[], "3").is_err() && of(&[], "x").unwrap_err().contains("the classes 0 to 2"));
    // The plot font covers many scripts, but not all.
    let labels = |names: &[&str]| [0, 1, 2].map(|n| named(names).class_label(n));
    assert_eq!(labels(&["Ōtsu", "東京", "Москва"]), ["Ōtsu", "#1 東京", "Москва"]);
    assert_eq!(labels(&[]), ["0", "1", "2"]);
    assert_eq!((named(&months).class_name(1), named(&[]).class_name(1)), ("02".into(), "#1".into()));
    assert!(of(&["a\x1b[1m", "b", "c"], "d\n").unwrap_err().contains("no class \"d\\n\"; the run has"));
}

#[test]
fn classes_of_other_data_match_by_name() {
    let data = |names: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            let image = Image::black(ImageShape { height: 16, width: 16, channels: 1 });
            image.save(folder.path().join(name).join("a.png")).unwrap();
        }
        crate::data::open_within(folder.path(), &DataOptions::default(), 1 << 20).unwrap()
    };
    let bees = named(&["ant", "bee", "cat"]);
    let of = |pipeline: &Pipeline, names: &[&str]| {
        pipeline.class_indices(&*data(names)).map_err(|e| e.to_string())
    };
    assert_eq!(of(&bees, &["ant", "bee", "cat"]), Ok(vec![0, 1, 2]));
    assert_eq!(of(&bees, &["bee", "cat"]), Ok(vec![1, 2]));
    let error = of(&bees, &["ant", "bee", "dog"]).unwrap_err();
    assert!(error.contains("has a class \"dog\"; the run has the classes ant, bee, cat"), "{error}");
    // Imported weights match by index, if the counts agree.
    assert_eq!(of(&named(&[]), &["bee", "cat", "dog"]), Ok(vec![0, 1, 2]));
    let error = of(&named(&[]), &["bee", "cat"]).unwrap_err();
    assert!(error.contains("has 2 classes, but the run has 3"), "{error}");
}
