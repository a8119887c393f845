"""What watches. Each sensor reads one small record and asks a pure function; none decides by itself, and none
keeps anything in its cursor that the store does not know."""
