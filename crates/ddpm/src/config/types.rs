//! The types of settings that are not plain numbers, text or lists.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Height and width in pixels; in a settings file one number if they are equal, else `[height, width]` or `"28x32"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "SizeText", into = "SizeText")]
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
#[serde(untagged, expecting = "expected one side in pixels, HEIGHTxWIDTH or [height, width]")]
enum SizeText {
    Side(usize),
    Sides([usize; 2]),
    Text(String),
}

impl TryFrom<SizeText> for Size {
    type Error = String;

    fn try_from(text: SizeText) -> Result<Self, String> {
        match text {
            SizeText::Side(side) => Ok(side.into()),
            SizeText::Sides([height, width]) => Ok(Self { height, width }),
            SizeText::Text(text) => text
                .parse()
                .map_err(|_| "expected one side in pixels, HEIGHTxWIDTH or [height, width]".to_owned()),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    /// `28` or `28x32`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (height, width) = text.split_once(['x', 'X']).unwrap_or((text, text));
        match (height.trim().parse(), width.trim().parse()) {
            (Ok(height), Ok(width)) => Ok(Self { height, width }),
            _ => Err("give one side in pixels, or HEIGHTxWIDTH, e.g. 28x32".to_owned()),
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
