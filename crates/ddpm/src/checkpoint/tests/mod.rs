mod disk;

use super::*;
use crate::config::Config;

fn tensor(name: &str, shape: &[usize], first: f32) -> NamedTensor {
    let data = (0..shape.iter().product()).map(|i: usize| first + i as f32 * 0.1).collect();
    NamedTensor { name: name.into(), shape: shape.to_vec(), data }
}

fn checkpoint(step: u64) -> Checkpoint {
    let set =
        |first: f32| vec![tensor("a.bias", &[3], first), tensor("a.weight", &[3, 2, 1, 1], first + 1.0)];
    let mut manifest = Manifest::new(step, &Config::default(), 9, Some(0.25));
    manifest.seed = 5;
    let first = step as f32;
    Checkpoint {
        manifest,
        weights: set(first),
        ema: set(first + 0.5),
        averages: Vec::new(),
        exp_avg: set(-first),
        exp_avg_sq: set(0.125),
    }
}

fn without_files(mut checkpoint: Checkpoint) -> Checkpoint {
    checkpoint.manifest.files.clear();
    checkpoint
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Replaces the contents of the file `name` and updates the manifest to match.
fn forge(path: &Path, name: &str, bytes: &[u8]) {
    fs::write(path.join(name), bytes).unwrap();
    let mut manifest = Manifest::read(path).unwrap();
    let facts = FileFacts { bytes: bytes.len() as u64, sha256: sha256(bytes) };
    manifest.files.insert(name.into(), facts);
    fs::write(path.join(MANIFEST), manifest.to_bytes().unwrap()).unwrap();
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn a_checkpoint_reads_back_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut saved = checkpoint(1000);
    saved.weights[0].data = vec![f32::from_bits(0x7fc0_1234), -0.0, f32::MIN_POSITIVE / 8.0];
    saved.weights.push(tensor("empty", &[0, 4], 0.0));
    saved.weights.push(tensor("scalar", &[], 3.0));
    saved.ema.push(tensor("empty", &[0, 4], 0.0));
    saved.ema.push(tensor("scalar", &[], 3.0));
    let path = save(dir.path(), &saved).unwrap();
    assert!(path.ends_with("step-0001000"));
    assert_eq!(names(&path), [EMA, MANIFEST, MODEL, OPTIMIZER]);
    let read = load(&path).unwrap();
    let bits = |set: &[NamedTensor]| -> Vec<_> {
        set.iter().flat_map(|t| t.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>()).collect()
    };
    assert_eq!(bits(&read.weights), bits(&saved.weights));
    assert_eq!((&read.ema, &read.exp_avg, &read.exp_avg_sq), (&saved.ema, &saved.exp_avg, &saved.exp_avg_sq));
    assert!(read.weights[3].shape.is_empty());
    assert_eq!(read.manifest.config(&path).unwrap(), Config::default());
    assert_eq!(without_files(read).manifest, saved.manifest);
}

#[test]
fn the_same_state_gives_the_same_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut shuffled = checkpoint(7);
    shuffled.weights.reverse();
    let (a, b) = (save(a.path(), &checkpoint(7)).unwrap(), save(b.path(), &shuffled).unwrap());
    for name in names(&a) {
        assert_eq!(fs::read(a.join(&name)).unwrap(), fs::read(b.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn files_of_tensors_are_those_of_the_safetensors_crate() {
    use safetensors::tensor::TensorView;
    use std::collections::HashMap;
    let long = tensor("b.weight", &[700, 500], 0.5);
    let mut set = checkpoint(1).weights;
    set.extend([tensor("empty", &[0, 4], 0.0), tensor("scalar", &[], 3.0), long]);
    set.push(tensor("a \"quoted\" näme", &[2], 1.0));
    set.push(NamedTensor { name: "a.num_batches_tracked".into(), shape: vec![], data: vec![17.0] });
    let file = TensorFile::new(set.iter().map(|t| ("prefix.", t)), &[]).unwrap();
    let bytes: Vec<(String, Vec<u8>)> = set
        .iter()
        .map(|t| {
            let data = t.data.iter();
            let bytes = if t.is_counter() {
                data.flat_map(|&v| (v as i64).to_le_bytes()).collect()
            } else {
                data.flat_map(|v| v.to_le_bytes()).collect()
            };
            (format!("prefix.{}", t.name), bytes)
        })
        .collect();
    let views = set.iter().zip(&bytes).map(|(t, (name, bytes))| {
        let dtype = if t.is_counter() { safetensors::Dtype::I64 } else { safetensors::Dtype::F32 };
        (name, TensorView::new(dtype, t.shape.clone(), bytes).unwrap())
    });
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let theirs = safetensors::serialize(views, Some(about)).unwrap();
    assert_eq!(file.len(), theirs.len());
    assert!(file.to_bytes() == theirs, "the bytes differ");
    // Entries keep their order, and other readers find them.
    let with =
        TensorFile::new(set.iter().map(|t| ("", t)), &[("z", "1"), ("a", "\"2\"\n")]).unwrap().to_bytes();
    let (_, read) = safetensors::SafeTensors::read_metadata(&with).unwrap();
    assert_eq!(read.metadata().as_ref().unwrap()["a"], "\"2\"\n");
    assert!(with[8..].starts_with(br#"{"__metadata__":{"format":"pt","z":"1","a":"\"2\"\n"},"#));
    assert_eq!(tensors::from_bytes(&with).unwrap().len(), set.len());
    let twice = TensorFile::new(set.iter().chain(&set[..1]).map(|t| ("", t)), &[]);
    assert_eq!(twice.err().unwrap(), "a.bias: occurs twice");
}

#[test]
fn averaged_and_raw_weights_can_be_read_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (with, mut without) = (checkpoint(1), checkpoint(2));
    without.ema.clear();
    without.manifest.loss = Some(f64::NAN);
    let (a, b) = (save(dir.path(), &with).unwrap(), save(dir.path(), &without).unwrap());
    assert!(!b.join(EMA).exists());
    let weights = |path: &Path, which| load_weights_only(path, &which).map(|(_, weights)| weights);
    assert_eq!(weights(&a, WeightsChoice::Auto).unwrap(), with.ema);
    assert_eq!(weights(&a, WeightsChoice::Ema).unwrap(), with.ema);
    assert_eq!(weights(&a, WeightsChoice::Raw).unwrap(), with.weights);
    assert_eq!(weights(&b, WeightsChoice::Auto).unwrap(), without.weights);
    assert!(weights(&b, WeightsChoice::Ema).unwrap_err().to_string().contains("no averaged weights"));
    assert_eq!(load(&b).unwrap().manifest.loss, None);
    assert_eq!(read_weights_file(&a.join(MODEL)).unwrap(), with.weights);
}

#[test]
fn any_changed_byte_is_detected_and_the_older_checkpoint_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let older = save(dir.path(), &checkpoint(1000)).unwrap();
    let newer = save(dir.path(), &checkpoint(2000)).unwrap();
    for name in [MODEL, EMA, OPTIMIZER, MANIFEST] {
        let file = newer.join(name);
        let whole = fs::read(&file).unwrap();
        let mut damages: Vec<Vec<u8>> =
            vec![whole[..whole.len() - 1].to_vec(), [&whole[..], b" "].concat(), Vec::new()];
        damages.extend((0..whole.len()).step_by(whole.len() / 40).chain([whole.len() - 1]).map(|at| {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            damaged
        }));
        for damaged in damages {
            fs::write(&file, damaged).unwrap();
            let found = newest(dir.path()).unwrap().unwrap();
            assert_eq!((&found.path, found.step), (&older, 1000));
            assert_eq!(found.skipped[0].0, newer);
            assert!(found.skipped[0].1.starts_with(name), "{}", found.skipped[0].1);
            let message = load(&newer).unwrap_err().to_string();
            assert!(message.contains(name) && message.ends_with("--checkpoint step-0001000"), "{message}");
            // To read only weights, just their own file and the manifest must be intact.
            for (which, file) in [(WeightsChoice::Raw, MODEL), (WeightsChoice::Auto, EMA)] {
                let (found, manifest, weights) = newest_weights(dir.path(), &which).unwrap().unwrap();
                let step = if [MANIFEST, file].contains(&name) { 1000 } else { 2000 };
                assert_eq!((found.step, manifest.step), (step, step), "{which:?}, damaged {name}");
                assert_eq!(weights, load_weights_only(&found.path, &which).unwrap().1);
            }
        }
        fs::remove_file(&file).unwrap();
        assert!(load(&newer).unwrap_err().to_string().contains(&format!("{name}: cannot be read")));
        fs::write(&file, whole).unwrap();
        assert_eq!(newest(dir.path()).unwrap().unwrap().step, 2000);
    }
}

#[test]
fn without_a_usable_checkpoint_every_reason_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(newest(dir.path()).unwrap(), None);
    assert_eq!(newest(&dir.path().join("missing")).unwrap(), None);
    for step in [1, 2] {
        let path = save(dir.path(), &checkpoint(step)).unwrap();
        fs::write(path.join(MODEL), "x").unwrap();
    }
    let message = newest(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("step-0000001: model.safetensors") && message.contains("step-0000002:"),
        "{message}"
    );
    let message = load(&path_of(dir.path(), 1)).unwrap_err().to_string();
    assert!(message.contains("there is no older checkpoint"), "{message}");
}

#[test]
fn a_newer_format_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &checkpoint(1)).unwrap();
    let text = fs::read_to_string(path.join(MANIFEST)).unwrap();
    fs::write(path.join(MANIFEST), text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("has format 2"));
}

#[test]
fn a_manifest_cannot_point_outside_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &checkpoint(1)).unwrap();
    let mut manifest = Manifest::read(&path).unwrap();
    manifest.files.insert("../../secret".into(), FileFacts { bytes: 1, sha256: String::new() });
    fs::write(path.join(MANIFEST), manifest.to_bytes().unwrap()).unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("lists an unknown file \"../../secret\""));
    manifest.files.clear();
    fs::write(path.join(MANIFEST), manifest.to_bytes().unwrap()).unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("does not list model.safetensors"));
}

#[test]
fn inconsistent_tensors_are_rejected_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &checkpoint(1)).unwrap();
    let file = |set: &[NamedTensor]| TensorFile::new(set.iter().map(|t| ("", t)), &[]).unwrap().to_bytes();
    for (name, set, expected) in [
        (
            EMA,
            vec![tensor("a.bias", &[3], 0.0)],
            "model.safetensors has the tensor a.weight [3, 2, 1, 1], but ema.safetensors does not",
        ),
        (EMA, vec![tensor("a.bias", &[1, 3], 0.0)], "ema.safetensors has the tensor a.bias [1, 3]"),
        (OPTIMIZER, vec![tensor("a.bias", &[3], 0.0)], "the tensor a.bias is not part of Adam's state"),
        (OPTIMIZER, vec![tensor("exp_avg.a.bias", &[3], 0.0)], "exp_avg_sq, does not"),
        (
            OPTIMIZER,
            vec![tensor("exp_avg.c", &[3], 0.0)],
            "exp_avg, has the tensor c [3], but model.safetensors does not",
        ),
    ] {
        save(dir.path(), &checkpoint(1)).unwrap();
        forge(&path, name, &file(&set));
        let message = load(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    for change in [
        |c: &mut Checkpoint| c.weights[1].name = "a.bias".into(),
        |c: &mut Checkpoint| c.weights[0].data.push(1.0),
        |c: &mut Checkpoint| c.exp_avg[0].shape = vec![3, 1],
        |c: &mut Checkpoint| drop(c.ema.pop()),
    ] {
        let mut wrong = checkpoint(3);
        change(&mut wrong);
        assert!(matches!(save(dir.path(), &wrong), Err(Error::Checkpoint { .. })));
    }
    assert_eq!(names(dir.path()), ["step-0000001"]);
}

#[test]
fn malicious_weight_files_are_rejected_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    let eight: Vec<_> = (0..9u64)
        .map(|i| {
            let size = (1u64 << 61) - 8;
            let (start, end) = (i.saturating_mul(size), (i + 1).saturating_mul(size));
            format!("\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{size}],\"data_offsets\":[{start},{end}]}}")
        })
        .collect();
    let mut endless = u64::MAX.to_le_bytes().to_vec();
    endless.extend([0; 64]);
    for (bytes, expected) in [
        (Vec::new(), "shorter than 8 bytes"),
        (vec![0; 7], "shorter than 8 bytes"),
        (endless, "its header has 18446744073709551615 bytes"),
        (safetensors("{]", 0), "its header"),
        (safetensors("[[[[[[", 0), "its header"),
        (safetensors(&format!("{{{}}}", eight.join(",")), 8), "extends past the end of the file"),
        (
            safetensors(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#, 11),
            "tensor a extends past",
        ),
        (
            safetensors(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#, 13),
            "not a complete safetensors file",
        ),
        (
            safetensors(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
            "overflow",
        ),
        (safetensors(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4), "offset"),
        (
            safetensors(r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#, 4),
            "tensor a is BF16: only F32 is supported",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        let message = read_weights_file(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{expected}: {message}");
    }
    assert!(matches!(read_weights_file(dir.path()), Err(Error::Io { .. })));
}

#[test]
fn weights_of_other_networks_are_rejected_by_name_and_shape() {
    let expected = |names: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> {
        names.iter().map(|&(n, s)| (n.to_owned(), s.to_vec())).collect()
    };
    let got = [tensor("a.bias", &[3], 0.0), tensor("a.weight", &[3, 2], 0.0)];
    let path = Path::new("x");
    check_fits(&expected(&[("a.weight", &[3, 2]), ("a.bias", &[3])]), &got, path).unwrap();
    let message = |names| check_fits(&expected(names), &got, path).unwrap_err().to_string();
    let text = message(&[("a.weight", &[2, 3]), ("a.bias", &[3]), ("b", &[1])]);
    assert!(
        text.contains("missing: b;") && text.contains("a.weight is [3, 2], but the network's is [2, 3]"),
        "{text}"
    );
    let text = message(&[("a.weights", &[3, 2]), ("1", &[]), ("2", &[]), ("3", &[]), ("4", &[])]);
    assert!(text.contains("missing: a.weights (there is a.weight), 1, 2 and 2 more"), "{text}");
    assert!(text.contains("not in the network: a.bias, a.weight."), "{text}");
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for step in [1, 2, 3, 9, 10, 12_345_678] {
        fs::create_dir(path_of(dir.path(), step)).unwrap();
    }
    fs::create_dir(dir.path().join("step-5")).unwrap();
    fs::create_dir(dir.path().join("step-+000005")).unwrap();
    assert_eq!(retain(dir.path(), 3, Some(2)).unwrap(), [1, 3]);
    assert_eq!(list(dir.path()).unwrap(), [2, 9, 10, 12_345_678]);
    assert_eq!(retain(dir.path(), 0, None).unwrap(), [2, 9]);
    assert_eq!(retain(dir.path(), 0, None).unwrap(), [0; 0]);
    assert_eq!(names(dir.path()).len(), 4);
}

#[test]
fn the_best_is_the_existing_checkpoint_with_the_lowest_finite_loss() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(best(dir.path()), None);
    let note = |step, loss| {
        fs::create_dir_all(path_of(dir.path(), step)).unwrap();
        note_best(dir.path(), step, loss).unwrap().map(|b| b.step)
    };
    assert_eq!(note(1, f64::NAN), None);
    assert_eq!(note(2, 0.5), Some(2));
    assert_eq!(note(3, 0.75), Some(2));
    assert_eq!(note(4, 1e-3), Some(4));
    assert_eq!(best(dir.path()), Some(Best { step: 4, loss: 1e-3 }));
    fs::remove_dir(path_of(dir.path(), 4)).unwrap();
    assert_eq!(best(dir.path()), None);
    fs::write(dir.path().join("best.json"), "{").unwrap();
    assert_eq!(best(dir.path()), None);
}

#[test]
fn later_checkpoints_are_set_aside_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    for round in ["aside-step-0000002", "aside-step-0000002-2"] {
        save(dir.path(), &checkpoint(1)).unwrap();
        save(dir.path(), &checkpoint(2)).unwrap();
        assert_eq!(set_aside_after(dir.path(), 1).unwrap(), [dir.path().join(round)]);
        assert_eq!(newest(dir.path()).unwrap().unwrap().step, 1);
        assert_eq!(load(&dir.path().join(round)).unwrap().manifest.step, 2);
    }
}

#[test]
fn remains_of_a_killed_process_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let whole = save(dir.path(), &checkpoint(1)).unwrap();
    // Killed while writing step 3; while replacing 2 and 1, before and after the rename; while recording the best.
    let half = dir.path().join(".tmp-step-0000003-77");
    fs::create_dir(&half).unwrap();
    fs::write(half.join(MODEL), "half").unwrap();
    save(dir.path(), &checkpoint(2)).unwrap();
    fs::rename(path_of(dir.path(), 2), dir.path().join(".old-step-0000002-77")).unwrap();
    fs::create_dir(dir.path().join(".old-step-0000001-77")).unwrap();
    fs::write(dir.path().join(".tmp-best.json-77"), "").unwrap();
    fs::write(dir.path().join("mine.txt"), "").unwrap();
    assert_eq!(newest(dir.path()).unwrap().unwrap().path, whole);
    assert_eq!(sweep_orphans(dir.path()).unwrap().len(), 4);
    assert_eq!(names(dir.path()), ["mine.txt", "step-0000001", "step-0000002"]);
    assert_eq!(newest(dir.path()).unwrap().unwrap().step, 2);
    assert!(sweep_orphans(dir.path()).unwrap().is_empty());
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = save(&file.join("checkpoints"), &checkpoint(1)).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(&file)), "{error}");
}

#[test]
fn additional_averages_are_saved_and_read_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = checkpoint(3);
    all.averages = vec![("ema-0.999".into(), all.weights.clone()), ("power-0.05".into(), all.ema.clone())];
    let path = save(folder.path(), &all).unwrap();
    assert_eq!(load(&path).unwrap().averages, all.averages);
    let read = |which: &str| load_weights_only(&path, &which.parse().unwrap()).map(|(_, weights)| weights);
    assert_eq!(read("ema-0.999").unwrap(), all.averages[0].1);
    assert_eq!(read("power-0.05").unwrap(), all.averages[1].1);
    let file = path.join("power-0.05.safetensors").display().to_string();
    assert_eq!(read(&file).unwrap(), all.averages[1].1);
    let error = read("ema-0.9").unwrap_err().to_string();
    assert!(error.contains("no average \"ema-0.9\"; there are ema-0.999, power-0.05"), "{error}");
    let none = save(folder.path(), &checkpoint(4)).unwrap();
    let error = load_weights_only(&none, &WeightsChoice::Average("ema-0.9".into())).unwrap_err().to_string();
    assert!(error.contains("has no additional averages (ema.extra_decays, ema.power_widths)"), "{error}");
    for wrong in ["ema-", "ema-../x", "rw", "power-0.05/../../x"] {
        let error = wrong.parse::<WeightsChoice>().unwrap_err().to_string();
        assert!(error.contains("give auto, ema, raw"), "{error}");
    }
    // Names that would escape the folder, and mismatched tensors, are not written.
    let mut odd = checkpoint(5);
    for (name, set, part) in [
        ("../x", odd.weights.clone(), "not the name of an average"),
        ("ema-0.5", odd.weights[..1].to_vec(), "differ from those of model"),
    ] {
        odd.averages = vec![(name.into(), set)];
        let error = save(folder.path(), &odd).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn snapshots_are_complete_and_replaceable() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshots");
    let all = checkpoint(1);
    for set in [&all.weights, &all.ema] {
        let path = save_snapshot(&dir, 7, &[("power-0.1".into(), set.clone())]).unwrap();
        assert_eq!(read_weights_file(&path.join("power-0.1.safetensors")).unwrap(), *set);
    }
    assert_eq!((names(&dir), list(&dir).unwrap()), (vec!["step-0000007".to_owned()], vec![7]));
    assert!(save_snapshot(Path::new("/proc/nowhere"), 7, &[]).is_err());
}
