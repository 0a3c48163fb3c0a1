"""The papers, on tensors: what numbers become, how they are measured, how they are smoothed. No files and no models here."""
