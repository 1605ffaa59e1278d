"""The keeper: one process per user that owns every sandbox, lease, template and kernel proxy."""
