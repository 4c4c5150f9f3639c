//! ImageService: decode, call, encode.

use std::collections::BTreeMap;
use std::sync::Arc;

use ocid_api::cri;
use ocid_api::cri::image_service_server::ImageService;
use serde_json::json;
use tonic::{Request, Response, Status, async_trait};

use super::stats;
use crate::error::{Context, Error, Kind, Result};
use crate::image::auth::Credentials;
use crate::image::{Image, Images};
use crate::stats::{Measured, now_ns};

/// The image service of one node.
#[derive(Debug)]
pub struct ImageApi {
    /// The images.
    pub images: Arc<Images>,
}

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

#[async_trait]
impl ImageService for ImageApi {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        let wanted = request.into_inner().filter.and_then(|filter| filter.image).map(|image| image.image);
        let found = match wanted.filter(|text| !text.is_empty()) {
            Some(text) => self.images.find(&text)?.into_iter().collect(),
            None => self.images.list(),
        };
        let images = found.iter().map(|image| shown(image)).collect();
        answer(cri::ListImagesResponse { images })
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let text = name(request.image)?;
        let Some(found) = self.images.find(&text)? else {
            return answer(cri::ImageStatusResponse::default());
        };
        let mut info = BTreeMap::new();
        if request.verbose {
            let config = self.images.raw_config(&found)?;
            let config = serde_json::from_slice::<serde_json::Value>(&config).unwrap_or_default();
            info.insert(
                "info".into(),
                json!({ "chainID": found.chain_ids.last(), "imageSpec": config }).to_string(),
            );
        }
        answer(cri::ImageStatusResponse { image: Some(shown(&found)), info })
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let text = name(request.image)?;
        let credentials = request.auth.as_ref().map(credentials).transpose()?.flatten();
        let id = self.images.pull(&text, credentials).await?;
        answer(cri::PullImageResponse { image_ref: id.to_string() })
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        self.images.remove(&name(request.into_inner().image)?).await?;
        answer(cri::RemoveImageResponse {})
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        let images = Arc::clone(&self.images);
        // A small file for each layer.
        let (usage, mountpoint) = tokio::task::spawn_blocking(move || images.usage())
            .await
            .context(Kind::Internal, || "measure the images".into())?;
        let measured = Measured { at_ns: now_ns(), bytes: usage.bytes, inodes: usage.inodes };
        let filesystem = stats::filesystem(&measured, &mountpoint.to_string_lossy());
        answer(cri::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        })
    }
}

fn shown(image: &Image) -> cri::Image {
    // A user is a number or a name, with or without a group behind a colon; no user is root.
    let user = image.user.split(':').next().unwrap_or_default();
    let uid = if user.is_empty() { Some(0) } else { user.parse::<i64>().ok() };
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.iter().cloned().collect(),
        repo_digests: image.repo_digests.iter().cloned().collect(),
        size: image.size.max(1),
        uid: uid.map(|value| cri::Int64Value { value }),
        username: if uid.is_some() { String::new() } else { user.to_owned() },
        spec: None,
        pinned: image.pinned,
    }
}

fn name(image: Option<cri::ImageSpec>) -> Result<String> {
    image
        .map(|image| image.image)
        .filter(|text| !text.is_empty())
        .ok_or_else(|| Error::invalid("no image is named"))
}

fn credentials(auth: &cri::AuthConfig) -> Result<Option<Credentials>> {
    Credentials::from_cri(
        &auth.username,
        &auth.password,
        &auth.auth,
        &auth.server_address,
        &auth.identity_token,
        &auth.registry_token,
    )
}
