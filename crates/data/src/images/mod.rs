//! Images converted to a common format: kept decoded in memory if they fit, else decoded on every read.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::classes::Classes;
use super::decode::{DecodeInfo, Pixels};
use super::format;
use super::options::{DataOptions, OnBadFile};
use super::order::AugmentKey;
use super::source::{DataContent, ImageSource};
use super::transform::Transform;
use super::{Dataset, Fingerprint, ImageShape, Summary, shorten, unusable};
use crate::error::{Error, Result};
use ddpm_text::{counted, shown};

/// The size and pixel format of a base image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PixelFormat {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub bits: u8,
}

/// An image that was decoded during the scan.
pub(super) struct Decoded {
    pub info: DecodeInfo,
    pub base: PixelFormat,
    /// SHA-256 of the base image.
    digest: [u8; 32],
    /// SHA-256 of the upright image before resizing, if requested.
    pub content: Option<[u8; 32]>,
    /// Bytes of the base image.
    pub bytes: u64,
    /// The base image, unless the memory limit was reached.
    pixels: Option<Pixels>,
}

/// The result of decoding every image of a source once.
pub(super) struct DatasetScan {
    /// The data set as named by the user.
    pub name: String,
    path: PathBuf,
    pub source: Box<dyn ImageSource>,
    pub classes: Classes,
    /// Notes that apply whether or not the data set is usable.
    pub notes: Vec<String>,
    /// The readable images, each with its index in the source.
    pub decoded: Vec<(usize, Decoded)>,
    /// The unreadable images, with the reasons.
    pub bad: Vec<(PathBuf, String)>,
    memory: u64,
}

impl DatasetScan {
    /// Decodes everything, keeping base images up to a total of `memory` bytes. `contents` enables content hashes.
    pub fn new(
        path: &Path,
        name: String,
        content: DataContent,
        options: &DataOptions,
        memory: u64,
        contents: bool,
    ) -> Result<Self> {
        let DataContent { source, classes, sorted, mut notes, bad: mut all_bad } = content;
        if u32::try_from(source.len()).is_err() {
            return Err(unusable(path, "it contains more than 2^32 images"));
        }
        let transform = Transform::new(options);
        let held = AtomicU64::new(0);
        let results: Vec<Result<Decoded, String>> = (0..source.len())
            .into_par_iter()
            .map(|i| {
                let (pixels, info) = source.image(i, options)?;
                let content = contents.then(|| pixels.digest());
                let base = transform.base(pixels)?;
                let bytes = base.bytes();
                let fits = held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= memory;
                Ok(Decoded {
                    info,
                    base: pixel_format(&base),
                    digest: base.digest(),
                    content,
                    bytes,
                    pixels: fits.then_some(base),
                })
            })
            .collect();
        let (mut decoded, mut bad) = (Vec::new(), Vec::new());
        for (i, result) in results.into_iter().enumerate() {
            match result {
                Ok(image) => decoded.push((i, image)),
                Err(reason) => bad.push((source.location(i), reason)),
            }
        }
        all_bad.append(&mut bad);
        format::note_count(
            &decoded,
            &mut notes,
            |p| p.info.more_frames,
            "multi-page or animated: only the first frame is read",
        );
        let mut images = vec![0; classes.len()];
        decoded.iter().filter_map(|(i, _)| source.label(*i)).for_each(|class| images[class as usize] += 1);
        let classes = Classes::new(&classes, &images, sorted, &mut notes);
        Ok(Self { name, path: path.to_owned(), source, classes, notes, decoded, bad: all_bad, memory })
    }

    /// Bytes of all base images.
    pub fn bytes(&self) -> u64 {
        self.decoded.iter().map(|(_, p)| p.bytes).sum()
    }

    /// The label of image `i` of the source.
    pub fn label(&self, i: usize) -> Option<u32> {
        self.source.label(i).and_then(|class| self.classes.label(class))
    }

    /// Converts the images to a common format.
    pub fn into_set(self, options: &DataOptions) -> Result<Images> {
        let bytes = self.bytes();
        let Self { name, path, source, classes, mut notes, decoded, bad: skipped, memory } = self;
        let skipped = check_readable(&path, decoded.len(), skipped, options)?;
        if !skipped.is_empty() {
            notes.push(format!("{} skipped: not readable as an image", counted(skipped.len(), "file")));
        }
        let transform = Transform::new(options);
        let found = format::histogram(&decoded);
        let (height, width) = format::common_size(&path, &decoded, options, &found, &mut notes)?;
        let channels = format::common_channels(&decoded, options, &mut notes)?;
        let bit_depth = format::common_depth(&decoded, &mut notes);
        format::note_count(
            &decoded,
            &mut notes,
            |p| p.info.reoriented,
            "rotated as the EXIF orientation says",
        );
        if let Some(parts) = transform.random_parts() {
            notes.push(format!("every read of an image applies {parts}"));
        }

        let cached = bytes <= memory;
        if !cached {
            notes.push(format!(
                "decoded, the images take {} MiB, more than the limit of {} MiB (data.memory_mib): every read decodes them \
                 again",
                bytes.div_ceil(1 << 20),
                memory >> 20
            ));
        }
        let mut fingerprint = Fingerprint::new();
        let mut labels = Vec::new();
        for (i, image) in &decoded {
            let class = source.label(*i);
            labels.extend(class.and_then(|class| classes.label(class)));
            // Hashes the source's class number, which does not depend on which files were skipped.
            fingerprint.add(source.name(*i), class, &image.digest);
        }
        let summary = Summary {
            source: name,
            images: decoded.len(),
            shape: ImageShape { height, width, channels },
            bit_depth,
            classes: classes.names.len(),
            found,
            skipped,
            memory_bytes: if cached { bytes } else { source.memory() },
            fingerprint: fingerprint.finish(),
            notes,
        };
        let mut set = Images {
            bases: Vec::new(),
            on_disk: None,
            labels,
            classes: classes.names,
            transform,
            options: options.clone(),
            summary,
        };
        if cached {
            // `bytes` excludes skipped files, so images may have been dropped during the scan although all of them fit.
            set.bases = decoded
                .into_par_iter()
                .map(|(i, image)| match image.pixels {
                    Some(pixels) => Ok(pixels),
                    None => decode_again(&*source, i, image.base, &transform, options),
                })
                .collect::<Result<_>>()?;
        } else {
            let entries = decoded.into_iter().map(|(i, image)| (i, image.base)).collect();
            set.on_disk = Some(OnDisk { source, entries });
        }
        Ok(set)
    }
}

/// Returns the unreadable files if they may be skipped.
fn check_readable(
    path: &Path,
    readable: usize,
    bad: Vec<(PathBuf, String)>,
    options: &DataOptions,
) -> Result<Vec<(PathBuf, String)>> {
    if options.on_bad_file == OnBadFile::Fail && !bad.is_empty() {
        return Err(Error::BadFiles { files: bad });
    }
    if readable == 0 {
        let reasons: Vec<_> = bad.iter().map(|(p, reason)| format!("{}: {reason}", shown(p))).collect();
        return Err(unusable(path, format!("no file here can be read as an image ({})", shorten(&reasons))));
    }
    Ok(bad)
}

/// The source of images that do not fit in memory.
struct OnDisk {
    source: Box<dyn ImageSource>,
    /// Each image's index in the source, and the format of its base.
    entries: Vec<(usize, PixelFormat)>,
}

/// A data set of images in a common format.
pub(super) struct Images {
    /// All base images; empty if they are on disk.
    bases: Vec<Pixels>,
    on_disk: Option<OnDisk>,
    /// The labels; empty if there are no classes.
    labels: Vec<u32>,
    classes: Vec<String>,
    transform: Transform,
    options: DataOptions,
    summary: Summary,
}

fn pixel_format(base: &Pixels) -> PixelFormat {
    PixelFormat { height: base.height, width: base.width, channels: base.channels, bits: base.bits() }
}

fn decode_again(
    source: &dyn ImageSource,
    i: usize,
    before: PixelFormat,
    transform: &Transform,
    options: &DataOptions,
) -> Result<Pixels> {
    let changed = |reason: String| {
        unusable(
            &source.location(i),
            format!(
                "the file has changed since the data set was opened: {reason}; restore it and continue with --resume"
            ),
        )
    };
    let (pixels, _) = source.image(i, options).map_err(changed)?;
    let stored = (pixels.height, pixels.width);
    let pixels = transform.base(pixels).map_err(changed)?;
    if (pixels.height, pixels.width) != (before.height, before.width) {
        let reason = format!("it is now {}x{}, which resizes to a different size", stored.0, stored.1);
        return Err(changed(reason));
    }
    Ok(pixels)
}

impl Dataset for Images {
    fn dims(&self) -> [usize; 4] {
        let ImageShape { height, width, channels } = self.summary.shape;
        [self.summary.images, height, width, channels]
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        assert!(index < self.summary.images);
        self.labels.get(index).copied()
    }

    fn read(&self, index: usize, key: AugmentKey, out: &mut [f32]) -> Result<()> {
        let ImageShape { height, width, channels } = self.summary.shape;
        let reread;
        let (base, location) = match &self.on_disk {
            None => (&self.bases[index], None),
            Some(on_disk) => {
                let (i, before) = on_disk.entries[index];
                reread = decode_again(&*on_disk.source, i, before, &self.transform, &self.options)?;
                (&reread, Some(on_disk.source.location(i)))
            }
        };
        let wrong = |reason: String| unusable(location.as_deref().unwrap_or(Path::new("an image")), reason);
        if base.channels > channels {
            return Err(wrong("it now has more channels than any file had; restart the run".into()));
        }
        let pixels = self.transform.augment(base, (height, width), key, index).map_err(wrong)?;
        pixels.write_unit(channels, out);
        Ok(())
    }

    fn summary(&self) -> Cow<'_, Summary> {
        Cow::Borrowed(&self.summary)
    }
}

impl Images {
    /// The base of image `index`; only for data sets in memory.
    #[cfg(test)]
    pub fn base(&self, index: usize) -> &Pixels {
        &self.bases[index]
    }
}

#[cfg(test)]
mod tests;
