"""A backbone as files that timm, DINO's code and onnxruntime read, with a model card; every file is checked."""

from patchssl.export.folder import ExportReport, export_model, is_export, push_model

__all__ = ["ExportReport", "export_model", "is_export", "push_model"]
