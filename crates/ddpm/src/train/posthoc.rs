//! EMAs of any length, reconstructed after training (post-hoc EMA): Karras et al., "Analyzing and Improving the
//! Training Dynamics of Diffusion Models", 2024, section 3 and appendix C.
//!
//! A power-function average weights step s of t by `(gamma + 1) s^gamma / t^(gamma + 1)` (section 3.1), so that its length
//! grows in proportion to the training: its relative width [`sigma_rel`](crate::power_ema::sigma_rel) is the standard deviation of that profile over t.
//! Training tracks the averages of `ema.power_widths` and saves snapshots of them ([`snapshots`]); the linear combination of
//! snapshots whose profile is closest to a given one approximates the average that would have been tracked with it.

use crate::checkpoint::{self, NamedTensor, TensorFile, read_weights_file};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::image::SOFTWARE;
use crate::interop::EmbeddedTexts;
use crate::nets;
use crate::power_ema::{Profile, coefficients, gamma};
use crate::run_folder::RunFolder;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A saved average.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Its profile.
    pub profile: Profile,
    /// Its weights file.
    pub path: PathBuf,
}

/// All snapshots of a run, in step order.
///
/// # Errors
/// [`Error::Io`].
pub fn snapshots(run: &RunFolder) -> Result<Vec<Snapshot>> {
    let dir = run.snapshots();
    let mut all = Vec::new();
    for step in checkpoint::list(&dir)? {
        let folder = checkpoint::path_of(&dir, step);
        let files = std::fs::read_dir(&folder).map_err(Error::io(&folder, "list the snapshots"))?;
        let mut names: Vec<String> =
            files.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        for name in names {
            let Some(Ok(gamma)) = power_width(&name).map(gamma) else { continue };
            all.push(Snapshot { profile: Profile { t: step as f64, gamma }, path: folder.join(name) });
        }
    }
    Ok(all)
}

/// The relative width in the name of a file `power-0.05.safetensors`.
fn power_width(name: &str) -> Option<f64> {
    name.strip_prefix(checkpoint::POWER)?.strip_suffix(checkpoint::SAFETENSORS)?.parse().ok()
}

/// An average reconstructed from snapshots.
#[derive(Clone, Debug, PartialEq)]
pub struct Averaged {
    /// The weights; running statistics are those of the last snapshot.
    pub weights: Vec<NamedTensor>,
    /// The last step of the average.
    pub step: u64,
    /// Number of snapshots it was computed from.
    pub snapshots: usize,
    /// Relative error of its profile.
    pub error: f64,
}

/// The average with that relative width at a step with snapshots, by default the last one.
///
/// # Errors
/// [`Error::Config`] for a width outside [`SIGMA_REL`](crate::power_ema::SIGMA_REL); [`Error::Run`] for a run without snapshots at that step;
/// [`Error::Checkpoint`] for damaged snapshots.
pub fn average(run: &RunFolder, config: &Config, width: f64, step: Option<u64>) -> Result<Averaged> {
    let target_gamma = gamma(width)?;
    let all = snapshots(run)?;
    let steps = checkpoint::list(&run.snapshots())?;
    let refuse = |reason: String| Error::Run { path: run.path().to_owned(), reason };
    let Some(&last) = steps.last() else {
        let reason = "has no snapshots of power-function averages; train with --set ema.power_widths=0.05,0.1, which saves them \
                      every ema.snapshot_every steps";
        return Err(refuse(reason.to_owned()));
    };
    let step = step.unwrap_or(last);
    if !steps.contains(&step) {
        let available: Vec<String> = steps.iter().map(u64::to_string).collect();
        return Err(refuse(format!("has no snapshot of step {step}; available: {}", available.join(", "))));
    }
    let used: Vec<Snapshot> = all.into_iter().filter(|s| s.profile.t <= step as f64).collect();
    let profiles: Vec<Profile> = used.iter().map(|s| s.profile).collect();
    let (coefficients, error) = coefficients(&profiles, Profile { t: step as f64, gamma: target_gamma })?;
    let channels = config.image_channels().unwrap_or(1);
    let (_, states) = nets::tensors_of(&*config.build_network(channels))?;
    let states: Vec<&str> = states.iter().map(|(name, _)| name.as_str()).collect();
    let weights = combine(&used, &coefficients, &states)?;
    Ok(Averaged { weights, step, snapshots: used.len(), error })
}

/// The linear combination of the snapshots' tensors, in f64; the tensors named in `states` are copied from the last one.
fn combine(used: &[Snapshot], coefficients: &[f64], states: &[&str]) -> Result<Vec<NamedTensor>> {
    let mut sums: Vec<(NamedTensor, Vec<f64>)> = Vec::new();
    let mut index: HashMap<String, usize> = HashMap::new();
    for (i, (snapshot, &coefficient)) in used.iter().zip(coefficients).enumerate() {
        let tensors = read_weights_file(&snapshot.path)?;
        let mismatch = |reason: String| Error::Checkpoint { path: snapshot.path.clone(), reason };
        if i > 0 && tensors.len() != sums.len() {
            return Err(mismatch(format!(
                "has {} tensors, but the others have {}",
                tensors.len(),
                sums.len()
            )));
        }
        for tensor in tensors {
            let (at, new) = match index.get(&tensor.name) {
                Some(&at) => (at, false),
                None if i == 0 => {
                    index.insert(tensor.name.clone(), sums.len());
                    sums.push((tensor.clone(), vec![0.0; tensor.data.len()]));
                    (sums.len() - 1, true)
                }
                None => {
                    return Err(mismatch(format!("has the tensor {}, but the others do not", tensor.name)));
                }
            };
            let (of, sum) = &mut sums[at];
            if !new && of.shape != tensor.shape {
                return Err(mismatch(format!(
                    "{} is {:?}, but {:?} in the others",
                    tensor.name, tensor.shape, of.shape
                )));
            }
            for (s, &x) in sum.iter_mut().zip(&tensor.data) {
                *s += coefficient * f64::from(x);
            }
            of.data = tensor.data;
        }
    }
    let rounded = |(tensor, sum): (NamedTensor, Vec<f64>)| {
        if states.contains(&tensor.name.as_str()) {
            tensor
        } else {
            NamedTensor { data: sum.into_iter().map(|x| x as f32).collect(), ..tensor }
        }
    };
    Ok(sums.into_iter().map(rounded).collect())
}

/// Writes an average of a run as a file for `ddpm sample --weights`, with the run's settings and classes, as in an export.
///
/// # Errors
/// [`Error::Io`].
pub fn write(run: &RunFolder, weights: &[NamedTensor], path: &Path) -> Result<()> {
    let wrong = |reason| Error::Checkpoint { path: path.to_owned(), reason };
    let about = match checkpoint::newest_manifest(&run.checkpoints())? {
        Some((folder, manifest)) => {
            EmbeddedTexts::of(&manifest.config(&folder)?, &manifest.classes).map_err(wrong)?
        }
        None => EmbeddedTexts::default(),
    };
    let metadata = [about.metadata(), vec![("software", SOFTWARE)]].concat();
    let file = TensorFile::new(weights.iter().map(|t| ("", t)), &metadata).map_err(wrong)?;
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(Error::io(parent, "make the folder"))?;
    }
    crate::storage::write_file(path, &file.to_bytes(), "write the averaged weights")
}
