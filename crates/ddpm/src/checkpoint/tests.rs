use std::cell::Cell;
use std::io::Write;
use std::rc::Rc;

use super::*;
use crate::config::Config;
use crate::storage::Output;

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
    let file = |set: &[NamedTensor]| to_bytes(set.iter().map(|t| ("", t))).unwrap();
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

/// A disk that is full at some call: only at that one, or for everything that needs space from then on.
struct FullDisk {
    calls: Rc<Cell<usize>>,
    fails_at: usize,
    stays_full: bool,
}

struct FullFile {
    file: fs::File,
    disk: FullDisk,
}

impl FullDisk {
    fn clone(&self) -> Self {
        Self { calls: Rc::clone(&self.calls), ..*self }
    }

    fn call(&self, needs_room: bool) -> io::Result<()> {
        let call = self.calls.replace(self.calls.get() + 1);
        if call == self.fails_at || self.stays_full && needs_room && call > self.fails_at {
            Err(io::Error::from_raw_os_error(28))
        } else {
            Ok(())
        }
    }
}

impl FileSystem for FullDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call(true)?;
        OsFileSystem.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.call(true)?;
        Ok(Box::new(FullFile { file: fs::File::create(path)?, disk: self.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(false)?;
        OsFileSystem.rename(from, to)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        self.call(true)
    }
}

impl Write for FullFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full disk writes a part before it fails.
        self.file.write_all(&bytes[..bytes.len() / 2])?;
        self.disk.call(true)?;
        self.file.write_all(&bytes[bytes.len() / 2..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Output for FullFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.call(true)
    }
}

// errno 28 is "no space left on device" only on Unix.
#[cfg(unix)]
#[test]
fn a_full_disk_at_any_call_leaves_the_old_checkpoints_and_nothing_else() {
    for (step, stays_full) in [(2000, false), (2000, true), (1000, false), (1000, true)] {
        let mut fails_at = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), &checkpoint(1000)).unwrap();
            let mut new = checkpoint(step);
            new.manifest.seed = 99;
            let disk = FullDisk { calls: Rc::default(), fails_at, stays_full };
            let saved = save_on(&disk, dir.path(), &new);
            let Err(error) = saved else {
                // Create, write and sync of four files; create and sync of the folder; two renames; sync of the parent.
                assert_eq!(fails_at, disk.calls.get());
                assert_eq!(fails_at, 4 * 3 + 2 + 2 + 1);
                break;
            };
            let message = error.to_string();
            assert!(matches!(error, Error::Io { .. }), "{message}");
            assert!(
                message.contains("takes 1 MB: free some space") && message.contains("step-000"),
                "{message}"
            );
            assert!(names(dir.path()).iter().all(|n| n.starts_with("step-")), "{:?}", names(dir.path()));
            let old = load(&path_of(dir.path(), 1000)).unwrap();
            // The last call comes after the final rename.
            if step == 2000 || fails_at < 16 {
                assert_eq!(without_files(old), checkpoint(1000), "call {fails_at}");
            }
            save(dir.path(), &new).unwrap();
            assert_eq!(newest(dir.path()).unwrap().unwrap().step, step);
            fails_at += 1;
        }
    }
}

// As above.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_snapshot_and_gives_advice() {
    let all = checkpoint(1);
    let set = |tensors: &[NamedTensor]| ["power-0.05", "power-0.1"].map(|n| (n.to_owned(), tensors.to_vec()));
    for stays_full in [false, true] {
        let mut fails_at = 0;
        loop {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path();
            let path = save_snapshot(dir, 7, &set(&all.weights)).unwrap();
            let disk = FullDisk { calls: Rc::default(), fails_at, stays_full };
            let Err(error) = save_snapshot_on(&disk, dir, 7, &set(&all.ema)) else {
                // Create, write and sync of two files; create and sync of the folder; two renames; sync of the parent.
                assert_eq!((fails_at, disk.calls.get()), (2 * 3 + 2 + 2 + 1, fails_at));
                break;
            };
            let message = error.to_string();
            let parts =
                [dir.to_str().unwrap(), "a snapshot of this run takes 1 MB: free some space and resume"];
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            assert_eq!(names(dir), ["step-0000007"]);
            // The last call comes after the final rename.
            let there = if fails_at < 10 { &all.weights } else { &all.ema };
            assert_eq!(read_weights_file(&path.join("power-0.1.safetensors")).unwrap(), *there, "{fails_at}");
            fails_at += 1;
        }
    }
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
