//! Sum of word, position and type embeddings.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{contiguous, if_tracked, output};

/// Row indices into the three tables, `[tokens]` each.
#[derive(Clone)]
pub struct EmbedIndices {
    pub word: Arc<[u32]>,
    pub position: Arc<[u32]>,
    pub token_type: Arc<[u32]>,
    /// The same in this order where the tables are: needed if they are not in host memory.
    pub on_device: Option<[Tensor; 3]>,
}

/// `word[ids] + position[positions] + type[type ids]`: `[tokens, hidden]`.
///
/// # Errors
/// An index beyond its table.
pub fn embed(
    word: &Tensor,
    position: &Tensor,
    token_type: &Tensor,
    indices: EmbedIndices,
) -> Result<Tensor> {
    word.apply_op3(position, token_type, Embed(indices))
}

struct Embed(EmbedIndices);

fn beyond(index: u32, rows: usize) -> candle_core::Error {
    let text = format!("index {index} is beyond the embedding table of {rows} rows");
    candle_core::Error::msg(text)
}

fn row(table: &[f32], hidden: usize, index: u32) -> Result<&[f32]> {
    let start = index as usize * hidden;
    table
        .get(start..start + hidden)
        .ok_or_else(|| beyond(index, table.len() / hidden))
}

impl CustomOp3 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(
        &self,
        word: &CpuStorage,
        word_layout: &Layout,
        position: &CpuStorage,
        position_layout: &Layout,
        token_type: &CpuStorage,
        type_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = word_layout.shape().dims2()?;
        let word = contiguous(word, word_layout)?;
        let position = contiguous(position, position_layout)?;
        let token_type = contiguous(token_type, type_layout)?;
        let tokens = self.0.word.len();
        let mut sum = Vec::with_capacity(tokens * hidden);
        for i in 0..tokens {
            let w = row(word, hidden, self.0.word[i])?;
            let p = row(position, hidden, self.0.position[i])?;
            let t = row(token_type, hidden, self.0.token_type[i])?;
            sum.extend(w.iter().zip(p).zip(t).map(|((w, p), t)| w + p + t));
        }
        output(sum, (tokens, hidden))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        word: &CudaStorage,
        word_layout: &Layout,
        position: &CudaStorage,
        position_layout: &Layout,
        token_type: &CudaStorage,
        type_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let indices = [&self.0.word, &self.0.position, &self.0.token_type];
        for (indices, layout) in indices
            .iter()
            .zip([word_layout, position_layout, type_layout])
        {
            let (rows, _) = layout.shape().dims2()?;
            if let Some(index) = indices.iter().find(|index| **index as usize >= rows) {
                return Err(beyond(*index, rows));
            }
        }
        let Some(on_device) = &self.0.on_device else {
            candle_core::bail!("the indices are not where the embeddings are");
        };
        let tables = [
            (word, word_layout),
            (position, position_layout),
            (token_type, type_layout),
        ];
        cuda::embed(tables, on_device)
    }

    fn bwd(
        &self,
        word: &Tensor,
        position: &Tensor,
        token_type: &Tensor,
        _sum: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let scatter = |table: &Tensor, indices: &Arc<[u32]>| {
            if_tracked(table, || {
                let indices = Tensor::new(&**indices, table.device())?;
                table.zeros_like()?.index_add(&indices, gradient, 0)
            })
        };
        Ok((
            scatter(word, &self.0.word)?,
            scatter(position, &self.0.position)?,
            scatter(token_type, &self.0.token_type)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    fn indices() -> EmbedIndices {
        EmbedIndices {
            word: [3, 0, 3, 6].into(),
            position: [0, 1, 2, 0].into(),
            token_type: [0, 0, 1, 1].into(),
            on_device: None,
        }
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        let tables = [random(1, (7, 5)), random(2, (3, 5)), random(3, (2, 5))];
        assert_gradient(&tables, |t| embed(&t[0], &t[1], &t[2], indices()));
    }

    #[test]
    fn an_index_beyond_the_table_is_an_error() {
        let table = random(1, (6, 5));
        let error = embed(&table, &table, &table, indices()).unwrap_err();
        assert!(error.to_string().contains("index 6"), "{error}");
    }
}
