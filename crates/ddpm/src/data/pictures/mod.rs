//! A set of pictures in one form, kept decoded in memory where they fit, else decoded at each reading.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::classes::Classes;
use super::decode::{Facts, Pixels};
use super::form;
use super::options::{DataOptions, OnBadFile};
use super::order::Draw;
use super::source::{Content, Source};
use super::transform::Transform;
use super::{Dataset, Fingerprint, PictureShape, Summary, count, shorten, unusable};
use crate::error::{Error, Result};
use crate::text::shown;

/// The form of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub bits: u8,
}

/// What is known of a picture that was decoded once.
pub(super) struct Seen {
    pub facts: Facts,
    pub base: Form,
    /// SHA-256 of the base.
    digest: [u8; 32],
    /// SHA-256 of the upright picture before it was resized; only where it was asked for.
    pub content: Option<[u8; 32]>,
    /// Bytes of the base.
    pub bytes: u64,
    pixels: Option<Pixels>,
}

/// Every picture of a source decoded once.
pub(super) struct Survey {
    /// What the user named.
    pub name: String,
    path: PathBuf,
    pub source: Box<dyn Source>,
    pub classes: Classes,
    /// What to tell whether or not the set can be used.
    pub notes: Vec<String>,
    /// The pictures that can be read: each one's number in the source, and what is known of it.
    pub seen: Vec<(usize, Seen)>,
    /// Those that cannot, with the reasons.
    pub bad: Vec<(PathBuf, String)>,
    memory: u64,
}

impl Survey {
    /// Decodes everything, keeping the bases while all of them together take at most `memory` bytes. With `contents`
    /// the pictures are told apart by what they show.
    pub fn new(
        path: &Path,
        name: String,
        content: Content,
        options: &DataOptions,
        memory: u64,
        contents: bool,
    ) -> Result<Self> {
        let Content { source, classes, sorted, mut notes, bad: mut all_bad } = content;
        if u32::try_from(source.len()).is_err() {
            return Err(unusable(path, "it holds more than 2^32 pictures"));
        }
        let transform = Transform::new(options);
        let held = AtomicU64::new(0);
        let decoded: Vec<Result<Seen, String>> = (0..source.len())
            .into_par_iter()
            .map(|i| {
                let (pixels, facts) = source.picture(i, options)?;
                let content = contents.then(|| pixels.digest());
                let base = transform.base(pixels)?;
                let bytes = base.bytes();
                let fits = held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= memory;
                Ok(Seen {
                    facts,
                    base: form_of(&base),
                    digest: base.digest(),
                    content,
                    bytes,
                    pixels: fits.then_some(base),
                })
            })
            .collect();
        let (mut seen, mut bad) = (Vec::new(), Vec::new());
        for (i, result) in decoded.into_iter().enumerate() {
            match result {
                Ok(picture) => seen.push((i, picture)),
                Err(reason) => bad.push((source.place(i), reason)),
            }
        }
        all_bad.append(&mut bad);
        form::tell(
            &seen,
            &mut notes,
            |p| p.facts.more_frames,
            "of several pages or frames: the first is read",
        );
        let mut images = vec![0; classes.len()];
        seen.iter().filter_map(|(i, _)| source.label(*i)).for_each(|class| images[class as usize] += 1);
        let classes = Classes::new(&classes, &images, sorted, &mut notes);
        Ok(Self { name, path: path.to_owned(), source, classes, notes, seen, bad: all_bad, memory })
    }

    /// Bytes of all bases.
    pub fn bytes(&self) -> u64 {
        self.seen.iter().map(|(_, p)| p.bytes).sum()
    }

    /// The class of picture `i` of the source.
    pub fn label(&self, i: usize) -> Option<u32> {
        self.source.label(i).and_then(|class| self.classes.label(class))
    }

    /// The set in one form.
    pub fn into_set(self, options: &DataOptions) -> Result<Pictures> {
        let bytes = self.bytes();
        let Self { name, path, source, classes, mut notes, seen, bad: skipped, memory } = self;
        if options.on_bad_file == OnBadFile::Fail && !skipped.is_empty() {
            return Err(Error::BadFiles { files: skipped });
        }
        if seen.is_empty() {
            let reasons: Vec<_> =
                skipped.iter().map(|(p, reason)| format!("{}: {reason}", shown(p))).collect();
            return Err(unusable(
                &path,
                format!("no file here can be read as an image ({})", shorten(&reasons)),
            ));
        }
        if !skipped.is_empty() {
            notes.push(format!("{} skipped: not readable as an image", count(skipped.len(), "file")));
        }
        let transform = Transform::new(options);
        let found = form::tally(&seen);
        let (height, width) = form::common_size(&path, &seen, options, &found, &mut notes)?;
        let channels = form::common_channels(&seen, options, &mut notes)?;
        let bit_depth = form::common_depth(&seen, &mut notes);
        form::tell(&seen, &mut notes, |p| p.facts.turned, "turned upright as the camera noted (EXIF)");
        if let Some(parts) = transform.random_parts() {
            notes.push(format!("each reading of a picture draws {parts}"));
        }

        let cached = bytes <= memory;
        if !cached {
            notes.push(format!(
                "decoded, the pictures take {} MiB; over {} MiB (data.memory_mib) they are decoded again each time",
                bytes.div_ceil(1 << 20),
                memory >> 20
            ));
        }
        let mut fingerprint = Fingerprint::new();
        let mut labels = Vec::new();
        for (i, picture) in &seen {
            let class = source.label(*i);
            labels.extend(class.and_then(|class| classes.label(class)));
            // With the source's own number, which depends neither on what a run knows nor on what was skipped.
            fingerprint.add(source.name(*i), class, &picture.digest);
        }
        let summary = Summary {
            source: name,
            pictures: seen.len(),
            shape: PictureShape { height, width, channels },
            bit_depth,
            classes: classes.names.len(),
            found,
            skipped,
            memory_bytes: if cached { bytes } else { source.memory() },
            fingerprint: fingerprint.finish(),
            notes,
        };
        let mut set = Pictures {
            bases: Vec::new(),
            outside: None,
            labels,
            classes: classes.names,
            transform,
            options: options.clone(),
            summary,
        };
        if cached {
            // With skipped files and a tight limit some may have been let go of although the rest fits.
            set.bases = seen
                .into_par_iter()
                .map(|(i, picture)| match picture.pixels {
                    Some(pixels) => Ok(pixels),
                    None => decode_again(&*source, i, picture.base, &transform, options),
                })
                .collect::<Result<_>>()?;
        } else {
            let places = seen.into_iter().map(|(i, picture)| (i, picture.base)).collect();
            set.outside = Some(Outside { source, places });
        }
        Ok(set)
    }
}

/// Where the pictures are that do not fit in memory.
struct Outside {
    source: Box<dyn Source>,
    /// Each one's number in the source, and the form of its base.
    places: Vec<(usize, Form)>,
}

/// Pictures in one form.
pub(super) struct Pictures {
    /// The bases of all pictures, or nothing when they take too much memory.
    bases: Vec<Pixels>,
    outside: Option<Outside>,
    /// All pictures' classes, or nothing.
    labels: Vec<u32>,
    classes: Vec<String>,
    transform: Transform,
    options: DataOptions,
    summary: Summary,
}

fn form_of(base: &Pixels) -> Form {
    Form { height: base.height, width: base.width, channels: base.channels, bits: base.bits() }
}

fn decode_again(
    source: &dyn Source,
    i: usize,
    before: Form,
    transform: &Transform,
    options: &DataOptions,
) -> Result<Pixels> {
    let changed = |reason: String| {
        unusable(
            &source.place(i),
            format!(
                "the file has changed since the data set was opened: {reason}; put it back, and go on with --resume"
            ),
        )
    };
    let (pixels, _) = source.picture(i, options).map_err(changed)?;
    let stored = (pixels.height, pixels.width);
    let pixels = transform.base(pixels).map_err(changed)?;
    if (pixels.height, pixels.width) != (before.height, before.width) {
        let reason = format!("it is {}x{} now, which does not become what it was", stored.0, stored.1);
        return Err(changed(reason));
    }
    Ok(pixels)
}

impl Dataset for Pictures {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        assert!(index < self.summary.pictures);
        self.labels.get(index).copied()
    }

    fn read(&self, index: usize, draw: Draw, out: &mut [f32]) -> Result<()> {
        let PictureShape { height, width, channels } = self.summary.shape;
        let again;
        let (base, place) = match &self.outside {
            None => (&self.bases[index], None),
            Some(outside) => {
                let (i, before) = outside.places[index];
                again = decode_again(&*outside.source, i, before, &self.transform, &self.options)?;
                (&again, Some(outside.source.place(i)))
            }
        };
        let wrong = |reason: String| unusable(place.as_deref().unwrap_or(Path::new("a picture")), reason);
        if base.channels > channels {
            return Err(wrong("it has more channels now than any file had; start the run again".into()));
        }
        let pixels = self.transform.draw(base, (height, width), draw, index).map_err(wrong)?;
        pixels.write_unit(channels, out);
        Ok(())
    }

    fn summary(&self) -> &Summary {
        &self.summary
    }
}

impl Pictures {
    /// The base of picture `index` of a set in memory.
    #[cfg(test)]
    pub fn base(&self, index: usize) -> &Pixels {
        &self.bases[index]
    }
}

#[cfg(test)]
mod tests;
