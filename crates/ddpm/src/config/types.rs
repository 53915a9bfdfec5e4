//! The types of settings that are not plain numbers, text or lists.

use serde::{Deserialize, Serialize};

/// Height and width in pixels; in a settings file one number if they are equal, else `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SizeText", into = "SizeText")]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.height, self.width)
    }
}

impl From<usize> for Size {
    /// A square.
    fn from(side: usize) -> Self {
        Self { height: side, width: side }
    }
}

impl From<(usize, usize)> for Size {
    /// Height and width.
    fn from((height, width): (usize, usize)) -> Self {
        Self { height, width }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one side in pixels or [height, width]")]
enum SizeText {
    Side(usize),
    Sides([usize; 2]),
}

impl From<SizeText> for Size {
    fn from(text: SizeText) -> Self {
        match text {
            SizeText::Side(side) => Self { height: side, width: side },
            SizeText::Sides([height, width]) => Self { height, width },
        }
    }
}

impl From<Size> for SizeText {
    fn from(Size { height, width }: Size) -> Self {
        if height == width { Self::Side(height) } else { Self::Sides([height, width]) }
    }
}

/// How the decay of the averaged weights is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmaKind {
    /// Rises to `decay` over the first steps.
    WarmUp,
    /// `decay` from the first step.
    Fixed,
    /// A half-life in images seen (Karras et al. 2022).
    HalfLife,
}

/// The learning-rate schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduleKind {
    /// Unchanged.
    Constant,
    /// Decays to `min_lr` along half a cosine.
    Cosine,
    /// Drops when the epoch's mean loss stops falling.
    Plateau,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam; weight decay is added to the gradient.
    Adam,
    /// Adam with decoupled weight decay.
    AdamW,
}
