//! Where sampler buffers lie in GPU memory.

use ddpm_engine::{BufferId, BufferSpec, Error, Result};

/// Threads per block of their kernels, and maximum blocks.
pub const THREADS: usize = 256;
pub const MAX_BLOCKS: usize = 4096;
/// Most elements of a buffer: the last iteration of a grid-stride loop overshoots by up to one grid.
const MAX_ELEMS: usize = i32::MAX as usize - THREADS * MAX_BLOCKS;

/// Where the buffers lie: one after another in GPU memory, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct BufferLayout {
    from: usize,
    stride: usize,
    count: usize,
    /// Images per buffer.
    pub images: usize,
    /// Elements per image.
    pub image: usize,
}

impl BufferLayout {
    /// Places the buffers after byte `end`; empty if no buffers are requested.
    ///
    /// # Errors
    /// [`Error::Device`] if there are more elements than the kernels can index.
    pub fn new(wanted: Option<BufferSpec>, end: usize) -> Result<Self> {
        let from = end.next_multiple_of(256);
        let Some(BufferSpec { count, shape }) = wanted else {
            return Ok(Self { from: end, ..Self::default() });
        };
        let images = shape.dims().first().copied().unwrap_or(1);
        if shape.len() > MAX_ELEMS {
            let reason =
                "the sampler's batch has too many elements (2^31 or more): use a smaller batch".to_owned();
            return Err(Error::Device { device: "cuda".to_owned(), reason });
        }
        let image = shape.len() / images.max(1);
        Ok(Self { from, stride: (shape.len() * 4).next_multiple_of(256), count, images, image })
    }

    /// Whether there are any buffers.
    pub fn any(&self) -> bool {
        self.count > 0
    }

    /// The end of the last buffer.
    pub fn end(&self) -> usize {
        self.from + self.stride * self.count
    }

    /// Elements per buffer.
    pub fn len(&self) -> usize {
        self.images * self.image
    }

    /// Byte offset of a buffer whose first `elems` elements are accessed.
    pub fn offset(&self, v: BufferId, elems: usize) -> usize {
        assert!(v.0 < self.count && elems <= self.len(), "{elems} elements of buffer {}", v.0);
        self.from + self.stride * v.0
    }
}
