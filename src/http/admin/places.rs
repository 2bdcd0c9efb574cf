//! What clients may name on this machine: files and folders below the data root, and the shipped
//! teacher adapters.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::distill::spec::{DataSpec, DistillSpec, SplitSpec, StudentSpec, TeacherSpec};
use crate::http::error::{ApiError, Problem};
use crate::hub::{self, Choice};

#[derive(Debug)]
pub(super) struct Places {
    /// The encoder that serves.
    pub(super) student: String,
    /// Canonical.
    pub(super) data_root: Option<PathBuf>,
    /// `{adapters}/{name}/teacher` are the shipped teacher adapters.
    pub(super) adapters: Option<PathBuf>,
}

impl Places {
    /// Replaces what the client named by absolute paths without links. Splits in `uploaded` are
    /// the server's own. Blocks.
    pub(super) fn resolve(
        &self,
        spec: &mut DistillSpec,
        uploaded: &[&'static str],
    ) -> Result<(), ApiError> {
        let data = &mut spec.data;
        let splits = [
            ("train", Some(&mut data.train)),
            ("validation", data.validation.as_mut()),
            ("test", data.test.as_mut()),
        ];
        for (name, split) in splits {
            if let Some(SplitSpec::Path(path)) = split
                && !uploaded.contains(&name)
            {
                *path = self.below_root(&format!("data.{name}.path"), path)?;
                if name == "train" && path.is_dir() && data.preset.is_some() {
                    continue;
                }
                if !path.is_file() {
                    return Err(Problem::Unusable.with(format!("data.{name}.path is not a file")));
                }
            }
        }
        self.resolve_preset(data)?;
        if let Some(student) = spec.student.take() {
            // The job is started with the server's name for it.
            self.check_student(&student)?;
        }
        match &mut spec.teacher {
            Some(teacher) => self.resolve_teacher(teacher),
            None => Ok(()),
        }
    }

    /// Names the files in the folder of a preset, each of which must lie below the data root by
    /// itself: the folder may hold links.
    fn resolve_preset(&self, data: &mut DataSpec) -> Result<(), ApiError> {
        let (Some(preset), SplitSpec::Path(folder)) = (data.preset, &data.train) else {
            return Ok(());
        };
        if !folder.is_dir() {
            return Ok(());
        }
        let files = preset
            .files(folder)
            .map_err(|error| Problem::Unusable.with(format!("data.train.path: {error}")))?;
        let train = self.below_root("data.train.path", &files.train)?;
        data.train = SplitSpec::Path(train);
        if data.test.is_none() {
            let test = self.below_root("data.test.path", &files.test)?;
            data.test = Some(SplitSpec::Path(test));
        }
        Ok(())
    }

    /// A version answers with the student that it was distilled for: that must be the one that
    /// serves. Whether another one exists is not told.
    fn check_student(&self, student: &StudentSpec) -> Result<(), ApiError> {
        let served = Choice::parse(&self.student).map_err(ApiError::internal)?;
        let asked = student.name();
        match Choice::parse(&asked) {
            Ok(asked) if asked.is_same(&served) => Ok(()),
            _ => Err(Problem::Unusable.with(format!(
                "this server's student is {}, and a version answers only with the student that it \
                 was distilled for; for another one start a server with `--student {asked}`",
                self.student
            ))),
        }
    }

    /// Replaces what the client named by what can be opened. Blocks.
    pub(super) fn resolve_teacher(&self, teacher: &mut TeacherSpec) -> Result<(), ApiError> {
        if teacher.http.is_some() {
            return Ok(());
        }
        teacher.model = self.encoder("teacher.model", &teacher.model)?;
        if let Some(adapter) = &mut teacher.adapter {
            *adapter = text(self.adapter(adapter)?)?;
        }
        Ok(())
    }

    /// A catalog name as it is, or the whole path of a folder; of either perhaps some layers.
    fn encoder(&self, field: &str, name: &str) -> Result<String, ApiError> {
        let unusable = |error: hub::HubError| Problem::Unusable.with(error.to_string());
        if hub::catalog::find(name).is_some() {
            return Ok(name.to_owned());
        }
        let path = match self.below_root(field, Path::new(name)) {
            Ok(path) => path,
            Err(error) => {
                if let Some((base, layers)) = name.rsplit_once('@') {
                    match self.encoder(field, base) {
                        Ok(base) => {
                            let name = format!("{base}@{layers}");
                            hub::check(&name).map_err(unusable)?;
                            return Ok(name);
                        }
                        // The folder is there, and cannot be used.
                        Err(error) if self.below_root(field, Path::new(base)).is_ok() => {
                            return Err(error);
                        }
                        Err(_) => {}
                    }
                }
                let names: Vec<_> = hub::entries().iter().map(|entry| &*entry.name).collect();
                return Err(unknown(field, name, "encoder", &names, &error));
            }
        };
        let path = text(path)?;
        // Names its missing files.
        hub::check(&path).map_err(unusable)?;
        Ok(path)
    }

    fn adapter(&self, name: &str) -> Result<PathBuf, ApiError> {
        let shipped = self.shipped_adapters();
        if let Some((_, path)) = shipped.iter().find(|(known, _)| known == name) {
            return Ok(path.clone());
        }
        let names: Vec<_> = shipped.iter().map(|(name, _)| name.as_str()).collect();
        self.below_root("teacher.adapter", Path::new(name))
            .map_err(|error| unknown("teacher.adapter", name, "shipped adapter", &names, &error))
    }

    /// Names and folders of the shipped teacher adapters, sorted.
    pub(super) fn shipped_adapters(&self) -> Vec<(String, PathBuf)> {
        let entries = self.adapters.as_ref().map(fs::read_dir);
        let Some(Ok(entries)) = entries else {
            return Vec::new();
        };
        let mut adapters: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let teacher = entry.path().join("teacher");
                let name = entry.file_name().into_string().ok()?;
                let is_adapter = teacher.join("adapter_config.json").is_file();
                is_adapter.then_some((name, teacher))
            })
            .collect();
        adapters.sort();
        adapters
    }

    /// The whole path of a folder that the client named.
    pub(super) fn folder(&self, field: &str, path: &Path) -> Result<PathBuf, ApiError> {
        let path = self.below_root(field, path)?;
        match path.is_dir() {
            true => Ok(path),
            false => Err(Problem::Unusable.with(format!("{field} is not a folder"))),
        }
    }

    /// The canonical form of a path that the client gave, which must lie below the data root with
    /// all links followed. Whether something outside exists is not told.
    fn below_root(&self, field: &str, path: &Path) -> Result<PathBuf, ApiError> {
        let Some(root) = &self.data_root else {
            return Err(Problem::Unusable.with(format!(
                "{field} names a path, but this server has no data root; start it with \
                 --data-root, or send the data in the request"
            )));
        };
        let outside = || {
            Problem::Unusable.with(format!(
                "{field}: there is no {} below the data root",
                path.display()
            ))
        };
        let climbs = path.components().any(|part| part == Component::ParentDir);
        let joined = root.join(path);
        if climbs || !joined.starts_with(root) {
            return Err(outside());
        }
        let canonical = joined.canonicalize().map_err(|_| outside())?;
        if !canonical.starts_with(root) || !holds_its_files(&canonical, root) {
            return Err(outside());
        }
        Ok(canonical)
    }
}

/// Whether no file of a folder is a link to a place outside of `root`.
fn holds_its_files(folder: &Path, root: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else {
        // Not a folder, or one that can't be read: whoever opens it will say so.
        return true;
    };
    entries.flatten().all(|entry| {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        !is_link
            || entry
                .path()
                .canonicalize()
                .is_ok_and(|path| path.starts_with(root))
    })
}

/// Neither a known name nor a usable path.
fn unknown(
    field: &str,
    given: &str,
    what: &str,
    names: &[&str],
    path_error: &ApiError,
) -> ApiError {
    let names = if names.is_empty() {
        "there are none".to_owned()
    } else {
        format!("they are: {}", names.join(", "))
    };
    Problem::Unusable.with(format!(
        "{field}: '{given}' names no {what} ({names}), and no folder: {}",
        path_error.detail()
    ))
}

/// A path for a field of text.
fn text(path: PathBuf) -> Result<String, ApiError> {
    path.into_os_string().into_string().map_err(|path| {
        let path = path.to_string_lossy();
        Problem::Unusable.with(format!("the path {path} is not UTF-8"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(root: &Path) -> Places {
        Places {
            student: "minilm-l6".to_owned(),
            data_root: Some(root.canonicalize().unwrap()),
            adapters: None,
        }
    }

    #[test]
    fn only_what_lies_below_the_data_root_can_be_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("inside")).unwrap();
        fs::write(root.join("inside/rows.jsonl"), "").unwrap();
        fs::write(folder.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
        std::os::unix::fs::symlink("inside", root.join("alias")).unwrap();
        fs::create_dir(root.join("adapter")).unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("adapter/config.json")).unwrap();
        let places = places(&root);
        let real = root.canonicalize().unwrap().join("inside/rows.jsonl");
        let absolute = real.to_str().unwrap().to_owned();
        for good in ["inside/rows.jsonl", "alias/rows.jsonl", &absolute] {
            let found = places.below_root("path", Path::new(good)).unwrap();
            assert_eq!(found, real, "{good}");
        }
        let secret = folder.path().join("secret");
        for bad in [
            "../secret",
            "inside/../../secret",
            "link",
            "adapter",
            "missing",
            "/etc/passwd",
            secret.to_str().unwrap(),
        ] {
            let error = places.below_root("path", Path::new(bad)).unwrap_err();
            assert_eq!(error.problem(), Problem::Unusable, "{bad}");
        }
    }

    #[test]
    fn without_a_data_root_no_path_can_be_named() {
        let places = Places {
            student: "minilm-l6".to_owned(),
            data_root: None,
            adapters: None,
        };
        let error = places.below_root("data.train.path", Path::new("x"));
        let message = error.unwrap_err().to_string();
        assert!(message.contains("--data-root"), "{message}");
    }

    #[test]
    fn an_unknown_teacher_is_answered_with_the_known_ones() {
        let folder = tempfile::tempdir().unwrap();
        let shipped = folder.path().join("shipped/movie-sentiment/teacher");
        fs::create_dir_all(&shipped).unwrap();
        fs::write(shipped.join("adapter_config.json"), "{}").unwrap();
        let places = Places {
            adapters: Some(folder.path().join("shipped")),
            ..places(folder.path())
        };
        let teacher = |model: &str, adapter: &str| TeacherSpec {
            http: None,
            model: model.into(),
            adapter: Some(adapter.into()),
            finetune: None,
        };
        let mut good = teacher("mpnet-base", "movie-sentiment");
        places.resolve_teacher(&mut good).unwrap();
        assert_eq!(good.adapter.as_deref(), shipped.to_str());

        let mut bad = teacher("gpt-5", "movie-sentiment");
        let message = places.resolve_teacher(&mut bad).unwrap_err().to_string();
        assert!(message.contains("minilm-l6, mpnet-base"), "{message}");
        let mut bad = teacher("mpnet-base", "movies");
        let message = places.resolve_teacher(&mut bad).unwrap_err().to_string();
        assert!(message.contains("they are: movie-sentiment"), "{message}");
    }
}
