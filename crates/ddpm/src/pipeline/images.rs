//! Sampled images.

use crate::image::{self, Image};
use std::ops::Deref;

/// Black pixels between and around the images of a grid, like torchvision's `make_grid`.
const PADDING: usize = 2;

/// Images of one shape; a slice of [`Image`], and more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images(Vec<Image>);

impl Images {
    /// All images on one, in rows of `columns`. One image is returned unchanged, none makes an empty image.
    pub fn grid(&self, columns: usize) -> Image {
        if self.0.is_empty() {
            return Image { height: 0, width: 0, channels: 1, data: Vec::new() };
        }
        image::grid(&self.0, columns, PADDING)
    }
}

impl Deref for Images {
    type Target = [Image];

    fn deref(&self) -> &[Image] {
        &self.0
    }
}

impl From<Vec<Image>> for Images {
    /// # Panics
    /// If the images differ in shape.
    fn from(images: Vec<Image>) -> Self {
        let shape = images.first().map(Image::shape);
        assert!(images.iter().all(|i| Some(i.shape()) == shape), "the images have one shape");
        Self(images)
    }
}

impl From<Images> for Vec<Image> {
    fn from(images: Images) -> Self {
        images.0
    }
}

impl IntoIterator for Images {
    type Item = Image;
    type IntoIter = std::vec::IntoIter<Image>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Images {
    type Item = &'a Image;
    type IntoIter = std::slice::Iter<'a, Image>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageShape;

    #[test]
    fn images_make_a_grid_with_two_pixels_between_them() {
        let shape = ImageShape { height: 4, width: 6, channels: 3 };
        let images = Images::from(vec![Image::black(shape); 5]);
        let grid = images.grid(2).shape();
        assert_eq!((grid.height, grid.width, grid.channels), (3 * 6 + 2, 2 * 8 + 2, 3));
        assert_eq!(Images::default().grid(3).shape().num_elements(), 0);
        assert_eq!((images.len(), images.into_iter().count()), (5, 5));
    }
}
