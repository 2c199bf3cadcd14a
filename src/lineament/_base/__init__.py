"""The ground floor: shapes, backends, extras, errors, seeds. Five files, closed to additions."""
