//! A set of images in one form, kept decoded in memory where they fit, else decoded at each reading.

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
use super::{Dataset, Fingerprint, ImageShape, Summary, count, shorten, unusable};
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

/// What is known of an image that was decoded once.
pub(super) struct Seen {
    pub facts: Facts,
    pub base: Form,
    /// SHA-256 of the base.
    digest: [u8; 32],
    /// SHA-256 of the upright image before it was resized; only where it was asked for.
    pub content: Option<[u8; 32]>,
    /// Bytes of the base.
    pub bytes: u64,
    pixels: Option<Pixels>,
}

/// Every image of a source decoded once.
pub(super) struct DatasetScan {
    /// What the user named.
    pub name: String,
    path: PathBuf,
    pub source: Box<dyn Source>,
    pub classes: Classes,
    /// What to tell whether or not the set can be used.
    pub notes: Vec<String>,
    /// The images that can be read: each one's number in the source, and what is known of it.
    pub seen: Vec<(usize, Seen)>,
    /// Those that cannot, with the reasons.
    pub bad: Vec<(PathBuf, String)>,
    memory: u64,
}

impl DatasetScan {
    /// Decodes everything, keeping the bases while all of them together take at most `memory` bytes. With `contents`
    /// the images are told apart by what they show.
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
            return Err(unusable(path, "it holds more than 2^32 images"));
        }
        let transform = Transform::new(options);
        let held = AtomicU64::new(0);
        let decoded: Vec<Result<Seen, String>> = (0..source.len())
            .into_par_iter()
            .map(|i| {
                let (pixels, facts) = source.image(i, options)?;
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
                Ok(image) => seen.push((i, image)),
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

    /// The class of image `i` of the source.
    pub fn label(&self, i: usize) -> Option<u32> {
        self.source.label(i).and_then(|class| self.classes.label(class))
    }

    /// The set in one form.
    pub fn into_set(self, options: &DataOptions) -> Result<Images> {
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
            notes.push(format!("each reading of an image draws {parts}"));
        }

        let cached = bytes <= memory;
        if !cached {
            notes.push(format!(
                "decoded, the images take {} MiB; over {} MiB (data.memory_mib) they are decoded again each time",
                bytes.div_ceil(1 << 20),
                memory >> 20
            ));
        }
        let mut fingerprint = Fingerprint::new();
        let mut labels = Vec::new();
        for (i, image) in &seen {
            let class = source.label(*i);
            labels.extend(class.and_then(|class| classes.label(class)));
            // With the source's own number, which depends neither on what a run knows nor on what was skipped.
            fingerprint.add(source.name(*i), class, &image.digest);
        }
        let summary = Summary {
            source: name,
            images: seen.len(),
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
                .map(|(i, image)| match image.pixels {
                    Some(pixels) => Ok(pixels),
                    None => decode_again(&*source, i, image.base, &transform, options),
                })
                .collect::<Result<_>>()?;
        } else {
            let places = seen.into_iter().map(|(i, image)| (i, image.base)).collect();
            set.outside = Some(Outside { source, places });
        }
        Ok(set)
    }
}

/// Where the images are that do not fit in memory.
struct Outside {
    source: Box<dyn Source>,
    /// Each one's number in the source, and the form of its base.
    places: Vec<(usize, Form)>,
}

/// Images in one form.
pub(super) struct Images {
    /// The bases of all images, or nothing when they take too much memory.
    bases: Vec<Pixels>,
    outside: Option<Outside>,
    /// All images' classes, or nothing.
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
    let (pixels, _) = source.image(i, options).map_err(changed)?;
    let stored = (pixels.height, pixels.width);
    let pixels = transform.base(pixels).map_err(changed)?;
    if (pixels.height, pixels.width) != (before.height, before.width) {
        let reason = format!("it is {}x{} now, which does not become what it was", stored.0, stored.1);
        return Err(changed(reason));
    }
    Ok(pixels)
}

impl Dataset for Images {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        assert!(index < self.summary.images);
        self.labels.get(index).copied()
    }

    fn read(&self, index: usize, draw: Draw, out: &mut [f32]) -> Result<()> {
        let ImageShape { height, width, channels } = self.summary.shape;
        let again;
        let (base, place) = match &self.outside {
            None => (&self.bases[index], None),
            Some(outside) => {
                let (i, before) = outside.places[index];
                again = decode_again(&*outside.source, i, before, &self.transform, &self.options)?;
                (&again, Some(outside.source.place(i)))
            }
        };
        let wrong = |reason: String| unusable(place.as_deref().unwrap_or(Path::new("an image")), reason);
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

impl Images {
    /// The base of image `index` of a set in memory.
    #[cfg(test)]
    pub fn base(&self, index: usize) -> &Pixels {
        &self.bases[index]
    }
}

#[cfg(test)]
mod tests {
    use super::super::support::{colour, grey, image, message, notes, plain, save};
    use super::super::{Alpha, Resize, open, open_within};
    use super::*;
    use image::{DynamicImage, ImageBuffer, Luma, Rgba, RgbaImage};
    use std::fs;
    use tempfile::TempDir;

    fn sized(folder: &TempDir, height: usize, width: usize) -> Result<Box<dyn Dataset>> {
        open(folder.path(), &DataOptions { size: Some((height, width)), ..DataOptions::default() })
    }

    #[test]
    fn several_sizes_are_listed_unless_one_is_asked_for() {
        let folder = TempDir::new().unwrap();
        for i in 0..3 {
            save(&folder, &format!("a{i}.png"), grey(20, 30, i));
        }
        for side in 1..=6 {
            save(&folder, &format!("b{side}.png"), grey(side, 9, 0));
        }
        let text = message(plain(&folder));
        assert!(
            text.contains("7 sizes, 1 to 20 x 9 to 30 (height x width): 20x30 (3 images), 1x9 (1 image), ")
                && text.contains("and 2 more"),
            "{text}"
        );
        assert!(text.contains("--size H (or HxW) resizes them all"));
        let set = sized(&folder, 8, 10).unwrap();
        assert_eq!(set.shape(), ImageShape { height: 8, width: 10, channels: 1 });
        let notes = notes(&*set);
        assert!(
            notes.contains("7 sizes found") && notes.contains("every image is resized to 8x10"),
            "{notes}"
        );
        assert!(notes.contains("6 of 9 images are smaller than 8x10, and enlarged"), "{notes}");
        assert_eq!(set.summary().found[0].images, 3);
    }

    #[test]
    fn grey_and_colour_together_are_colour_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(4, 4, 77));
        save(&folder, "b.png", colour(4, 4, 5));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 3);
        assert!(notes(&*set).contains("1 of 2 images is grey, made RGB"));
        let a = image(&*set, 0);
        assert_eq!(a[..3], [77.0 / 255.0 * 2.0 - 1.0; 3]);
        assert_eq!(image(&*set, 1)[0], 5.0 / 255.0 * 2.0 - 1.0);
        let options = DataOptions { channels: Some(1), ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        assert_eq!(set.shape().channels, 1);
        assert!(notes(&*set).contains("1 of 2 images is in colour, made grey"));
    }

    #[test]
    fn grey_pixels_in_colour_files_make_a_grey_set_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        let as_colour = DynamicImage::ImageLuma8(grey(4, 4, 8)).to_rgb8();
        save(&folder, "a.png", as_colour);
        save(&folder, "b.png", grey(4, 4, 8));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 1);
        assert!(notes(&*set).contains("1 of 2 images is stored in colour, yet every pixel is grey"));
        assert_eq!(image(&*set, 0), image(&*set, 1));
    }

    #[test]
    fn alpha_is_dropped_laid_on_black_or_kept_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        let with = |alpha| {
            RgbaImage::from_fn(2, 2, move |x, _| Rgba([200, 10, 10, if x == 0 { 255 } else { alpha }]))
        };
        save(&folder, "a.png", with(255));
        save(&folder, "b.png", with(0));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 3);
        assert!(
            notes(&*set).contains("1 of 2 images is stored with an alpha channel that is opaque everywhere")
        );
        assert!(notes(&*set).contains("1 of 2 images is transparent in places: laid on black"));
        assert_eq!(image(&*set, 1)[3..6], [-1.0; 3]);
        let set = open(folder.path(), &DataOptions { channels: Some(4), ..DataOptions::default() }).unwrap();
        let (a, b) = (image(&*set, 0), image(&*set, 1));
        assert_eq!((a[3], a[7], b[3], b[7]), (1.0, 1.0, 1.0, -1.0));
    }

    #[test]
    fn two_depths_keep_sixteen_bits() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(1, 1, 200));
        save(
            &folder,
            "b.png",
            DynamicImage::ImageLuma16(ImageBuffer::from_pixel(1, 1, Luma([200u16 * 257 + 1]))),
        );
        let set = plain(&folder).unwrap();
        assert_eq!(set.summary().bit_depth, 16);
        assert!(notes(&*set).contains("1 of 2 images is of 16 bits"));
        let difference = image(&*set, 1)[0] - image(&*set, 0)[0];
        assert!((difference - 2.0 / 65_535.0).abs() < 1e-7, "{difference}");
    }

    /// Two good files, three bad ones.
    fn damaged() -> TempDir {
        let folder = TempDir::new().unwrap();
        save(&folder, "x/a.png", colour(30, 30, 0));
        save(&folder, "x/c.png", colour(30, 30, 0));
        save(&folder, "y/good.png", colour(30, 30, 0));
        let cut = folder.path().join("x/a.png");
        let bytes = fs::read(&cut).unwrap();
        fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
        fs::write(folder.path().join("x/b.png"), "not an image").unwrap();
        fs::write(folder.path().join("y/empty.jpg"), "").unwrap();
        folder
    }

    #[test]
    fn bad_files_are_all_listed() {
        let folder = damaged();
        match plain(&folder) {
            Err(Error::BadFiles { files }) => {
                let names: Vec<_> =
                    files.iter().map(|(p, _)| p.strip_prefix(folder.path()).unwrap()).collect();
                assert_eq!(names, [Path::new("x/a.png"), Path::new("x/b.png"), Path::new("y/empty.jpg")]);
                assert!(files[0].1.contains("damaged or cut off"), "{}", files[0].1);
                assert!(files[1].1.contains("is not an image"));
                assert_eq!(files[2].1, "is empty");
            }
            other => panic!("{:?}", other.err()),
        }
    }

    #[test]
    fn bad_files_can_be_skipped_until_nothing_is_left() {
        let folder = damaged();
        let options = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        assert_eq!((set.len(), set.label(0), set.label(1)), (2, Some(0), Some(1)));
        assert_eq!(set.summary().skipped.len(), 3);
        assert!(notes(&*set).contains("3 files skipped"));
        fs::remove_file(folder.path().join("x/c.png")).unwrap();
        fs::remove_file(folder.path().join("y/good.png")).unwrap();
        assert!(message(open(folder.path(), &options)).contains("no file here can be read as an image"));
    }

    #[test]
    fn what_does_not_fit_in_memory_is_read_from_disk_the_same() {
        let folder = TempDir::new().unwrap();
        for i in 0..6 {
            save(&folder, &format!("{i}.png"), colour(20, 16, i));
        }
        save(&folder, "6.png", grey(20, 16, 0));
        for size in [None, Some((8, 8))] {
            let options = DataOptions { size, ..DataOptions::default() };
            let inside = open(folder.path(), &options).unwrap();
            let outside = open_within(folder.path(), &options, 100).unwrap();
            assert_eq!(outside.summary().memory_bytes, 0);
            assert!(inside.summary().memory_bytes > 0);
            assert!(notes(&*outside).contains("decoded again each time"));
            assert_eq!(inside.summary().fingerprint, outside.summary().fingerprint);
            for i in 0..7 {
                assert_eq!(image(&*inside, i), image(&*outside, i));
            }
        }
        let set = open_within(folder.path(), &DataOptions::default(), 100).unwrap();
        save(&folder, "0.png", colour(21, 16, 0));
        fs::remove_file(folder.path().join("1.png")).unwrap();
        let mut out = vec![0.0; set.shape().values()];
        for (i, what) in [(0, "it is 21x16 now, which does not become what it was"), (1, "cannot be read")] {
            let text = set.read(i, Draw::default(), &mut out).unwrap_err().to_string();
            assert!(text.contains("has changed since") && text.contains(what), "{text}");
        }
    }

    #[test]
    fn the_fingerprint_is_of_the_pixels_and_names() {
        let make = |name: &str, value: u8, in_colour: bool| {
            let folder = TempDir::new().unwrap();
            let image = DynamicImage::ImageLuma8(grey(3, 3, value));
            match in_colour {
                true => save(&folder, name, image.to_rgb8()),
                false => save(&folder, name, image),
            }
            plain(&folder).unwrap().summary().fingerprint.clone()
        };
        let first = make("a.png", 1, false);
        assert_eq!(first.len(), 64);
        assert_eq!(first, make("a.png", 1, true));
        assert_ne!(first, make("a.png", 2, false));
        assert_ne!(first, make("b.png", 1, false));
        assert_ne!(first, make("a/a.png", 1, false));
    }

    #[test]
    fn kept_alpha_takes_the_channels_that_all_images_need() {
        let folder = TempDir::new().unwrap();
        let keep = |channels| DataOptions { alpha: Some(Alpha::Keep), channels, ..DataOptions::default() };
        save(&folder, "a.png", RgbaImage::from_pixel(2, 2, Rgba([9, 9, 9, 128])));
        let set = open(folder.path(), &keep(None)).unwrap();
        assert_eq!(set.shape().channels, 2);
        let refused = message(open(folder.path(), &keep(Some(1))));
        assert!(refused.starts_with("data.alpha: the image is transparent in places"), "{refused}");
        assert!(refused.contains("data.channels = 2"), "{refused}");
        // Grey with alpha beside colour without.
        save(&folder, "b.png", colour(2, 2, 5));
        let set = open(folder.path(), &keep(None)).unwrap();
        assert_eq!(set.shape().channels, 4);
        assert_eq!(image(&*set, 0)[..4], [9, 9, 9, 128].map(|v: u8| f32::from(v) / 255.0 * 2.0 - 1.0));
        assert_eq!(image(&*set, 1)[3], 1.0);
        let white = DataOptions { alpha: Some(Alpha::White), ..DataOptions::default() };
        let set = open(folder.path(), &white).unwrap();
        assert_eq!(set.shape().channels, 3);
        assert!(notes(&*set).contains("laid on white"));
        // Without transparency three channels keep all there is.
        fs::remove_file(folder.path().join("a.png")).unwrap();
        assert_eq!(open(folder.path(), &keep(Some(3))).unwrap().shape().channels, 3);
        assert_eq!(open(folder.path(), &keep(None)).unwrap().shape().channels, 3);
    }

    #[test]
    fn exact_sizes_cut_nothing_off() {
        let folder = TempDir::new().unwrap();
        // White, with a black column at each end.
        let edges =
            image::GrayImage::from_fn(30, 10, |x, _| Luma([if (3..27).contains(&x) { 255 } else { 0 }]));
        save(&folder, "a.png", edges);
        let corner = |resize| {
            let options = DataOptions { size: Some((10, 10)), resize, ..DataOptions::default() };
            let set = open(folder.path(), &options).unwrap();
            (image(&*set, 0)[0], notes(&*set))
        };
        assert_eq!(corner(Resize::ShortSide).0, 1.0);
        let (value, notes) = corner(Resize::Exact);
        assert!(value < -0.5 && notes.contains("resized to 10x10 (both sides)"), "{value} {notes}");
    }

    #[test]
    fn random_crops_and_flips_are_the_same_in_memory_and_from_disk() {
        let folder = TempDir::new().unwrap();
        for (i, (height, width)) in [(20, 30), (41, 17), (16, 16), (1, 1)].into_iter().enumerate() {
            save(&folder, &format!("{i}.png"), colour(height, width, i as u8));
        }
        let options = DataOptions {
            size: Some((8, 12)),
            random_crop_scale: Some([0.3, 1.0]),
            horizontal_flip: true,
            ..DataOptions::default()
        };
        let inside = open(folder.path(), &options).unwrap();
        let outside = open_within(folder.path(), &options, 0).unwrap();
        let note =
            "each reading of an image draws a random crop of 30 to 100 % of the area and a random flip";
        assert!(notes(&*inside).contains(note), "{}", notes(&*inside));
        assert_eq!(inside.summary().fingerprint, outside.summary().fingerprint);
        assert_eq!(inside.shape(), ImageShape { height: 8, width: 12, channels: 3 });
        let read = |set: &dyn Dataset, index, epoch| {
            let mut out = vec![9.0; 8 * 12 * 3];
            set.read(index, Draw { seed: 4, epoch }, &mut out).unwrap();
            out
        };
        for index in 0..4 {
            for epoch in 0..3 {
                assert_eq!(read(&*inside, index, epoch), read(&*outside, index, epoch));
            }
        }
        assert_ne!(read(&*inside, 0, 0), read(&*inside, 0, 1));
    }
}
