//! The common format of all images of a data set, and the notes about the conversion.

use std::collections::BTreeMap;
use std::path::Path;

use super::images::Decoded;
use super::options::{Alpha, DataOptions, Resize};
use super::transform::enlarges;
use super::{FormatCount, channels_name, shorten, unusable};
use crate::error::{Error, Result};
use ddpm_text::{counted, thousands};

/// The formats of the files with their counts, most frequent first.
pub(super) fn histogram(images: &[(usize, Decoded)]) -> Vec<FormatCount> {
    let mut counts = BTreeMap::new();
    for FormatCount { height, width, channels, bits, .. } in images.iter().map(|(_, p)| p.info.file) {
        *counts.entry((height, width, channels, bits)).or_insert(0) += 1;
    }
    let mut found: Vec<_> = counts
        .into_iter()
        .map(|((height, width, channels, bits), images)| FormatCount {
            height,
            width,
            channels,
            bits,
            images,
        })
        .collect();
    found.sort_by_key(|f| std::cmp::Reverse(f.images));
    found
}

/// The common size of all images.
pub(super) fn common_size(
    path: &Path,
    images: &[(usize, Decoded)],
    options: &DataOptions,
    found: &[FormatCount],
    notes: &mut Vec<String>,
) -> Result<(usize, usize)> {
    let mut counts = BTreeMap::new();
    for f in found {
        *counts.entry((f.height, f.width)).or_insert(0) += f.images;
    }
    let mut sizes: Vec<_> = counts.into_iter().collect();
    sizes.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let listed = shorten(
        &sizes.iter().map(|((h, w), n)| format!("{h}x{w} ({})", counted(*n, "image"))).collect::<Vec<_>>(),
    );
    match options.size {
        None if sizes.len() == 1 => Ok(sizes[0].0),
        None => Err(unusable(
            path,
            format!(
                "the images have {} sizes{} (height x width): {listed}; --size H (or HxW) resizes them all",
                thousands(sizes.len()),
                range(&sizes)
            ),
        )),
        Some((h, w)) => {
            if sizes.len() > 1 {
                notes.push(format!(
                    "{} sizes found{} (height x width): {listed}",
                    thousands(sizes.len()),
                    range(&sizes)
                ));
            }
            let side = options.resize_side.filter(|_| options.resize == Resize::ShortSide);
            if sizes.iter().any(|&(size, _)| size != (h, w) || side.is_some_and(|s| s != size.0.min(size.1)))
            {
                let prefix = if sizes.len() == 1 {
                    format!("the images are {}x{}: ", sizes[0].0.0, sizes[0].0.1)
                } else {
                    String::new()
                };
                let how = match (options.resize, options.resize_side, options.random_crop_scale) {
                    (Resize::Exact, _, _) => "both sides".to_owned(),
                    (Resize::ShortSide, Some(side), None) => {
                        format!("short side to {side}, then a center crop")
                    }
                    (Resize::ShortSide, Some(side), _) => format!("short side to {side}, then a random crop"),
                    (Resize::ShortSide, None, None) => "short side, then a center crop".to_owned(),
                    (Resize::ShortSide, None, _) => "a random crop".to_owned(),
                };
                notes.push(format!("{prefix}every image is resized to {h}x{w} ({how})"));
            }
            let small = |p: &Decoded| enlarges(p.info.file.height, p.info.file.width, options);
            let min_size = side.map_or(format!("{h}x{w}"), |s| format!("{s} pixels on the short side"));
            note_count(images, notes, small, &format!("smaller than {min_size}: enlarged"));
            Ok((h, w))
        }
    }
}

/// The ranges of heights and widths, if there are too many sizes to list.
fn range(sizes: &[((usize, usize), usize)]) -> String {
    let sides = |f: fn(&(usize, usize)) -> usize| {
        let all = || sizes.iter().map(|(size, _)| f(size));
        Some((all().min()?, all().max()?))
    };
    match (sides(|s| s.0), sides(|s| s.1)) {
        (Some((min_h, max_h)), Some((min_w, max_w))) if sizes.len() > 5 => {
            format!(", {min_h} to {max_h} x {min_w} to {max_w}")
        }
        _ => String::new(),
    }
}

/// The fewest channels that hold every image without loss, or those set in `options`.
pub(super) fn common_channels(
    images: &[(usize, Decoded)],
    options: &DataOptions,
    notes: &mut Vec<String>,
) -> Result<usize> {
    let with_channels = |n: usize| images.iter().filter(|(_, p)| p.base.channels == n).count();
    // A mix of grey with alpha and RGB without alpha needs all four.
    let (colour, alpha) = (with_channels(3) + with_channels(4) > 0, with_channels(2) + with_channels(4) > 0);
    let needed = if colour { 3 } else { 1 } + usize::from(alpha);
    let channels = options.channels.unwrap_or(needed);
    let colour_files = images.iter().filter(|(_, p)| p.info.file.channels >= 3).count();
    let grey_in_colour = images.iter().filter(|(_, p)| p.info.grey_in_colour).count();
    if channels <= 2 {
        if grey_in_colour > 0 {
            notes.push(format!(
                "{} stored in colour, but every pixel is grey: read as grey",
                are(grey_in_colour, images.len())
            ));
        }
        if colour_files > grey_in_colour {
            notes.push(format!(
                "{} in colour: converted to grey (luma)",
                are(colour_files - grey_in_colour, images.len())
            ));
        }
    } else {
        let grey = with_channels(1) + with_channels(2);
        if grey > 0 {
            notes.push(format!("{} grey: converted to {}", are(grey, images.len()), channels_name(channels)));
        }
    }
    note_count(
        images,
        notes,
        |p| p.info.opaque_alpha,
        "stored with a fully opaque alpha channel: it is dropped",
    );
    let composited = images.iter().filter(|(_, p)| p.info.composited).count();
    if composited > 0 && options.alpha == Some(Alpha::Keep) {
        let reason = format!(
            "{} partly transparent, and {channels} channels cannot hold alpha; use data.channels = {}, or \"black\" or \
             \"white\" to composite on that colour",
            are(composited, images.len()),
            channels + 1
        );
        return Err(Error::Option { option: "data.alpha".into(), reason });
    }
    let background = if options.alpha == Some(Alpha::White) { "white" } else { "black" };
    let what = format!("partly transparent: composited on {background} (--channels 2 or 4 keeps alpha)");
    note_count(images, notes, |p| p.info.composited, &what);
    Ok(channels)
}

/// Bits per sample: 16 if any image has 16, else 8.
pub(super) fn common_depth(images: &[(usize, Decoded)], notes: &mut Vec<String>) -> u8 {
    let deep = images.iter().filter(|(_, p)| p.base.bits == 16).count();
    if deep > 0 && deep < images.len() {
        notes.push(format!("{} 16-bit, the others 8-bit", are(deep, images.len())));
    }
    if deep > 0 { 16 } else { 8 }
}

/// Adds a note with the number of images for which `holds` is true, if any.
pub(super) fn note_count(
    images: &[(usize, Decoded)],
    notes: &mut Vec<String>,
    holds: impl Fn(&Decoded) -> bool,
    what: &str,
) {
    let n = images.iter().filter(|(_, p)| holds(p)).count();
    if n > 0 {
        notes.push(format!("{} {what}", are(n, images.len())));
    }
}

/// "all 7 images are", "1 of 7 images is".
fn are(n: usize, of: usize) -> String {
    match n {
        _ if of == 1 => "the image is".to_owned(),
        _ if n == of => format!("all {of} images are"),
        1 => format!("1 of {of} images is"),
        _ => format!("{n} of {of} images are"),
    }
}
